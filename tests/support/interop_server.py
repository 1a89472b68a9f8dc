"""gRPC's test service on gRPC's C core, for tests/grpc_interop.rs.

    PYTHONPATH=<where grpcio is> python3 interop_server.py CERTIFICATE KEY

Listens on two free ports of 127.0.0.1, says which as "PLAINTEXT TLS" in one line, and ends with its standard input.
The few messages are read and written by hand: so it needs grpcio alone, and no code that is generated.
"""

import sys
import time
from concurrent import futures

import grpc

# Calls that are cancelled hold a thread until their handler has noticed.
THREADS = 64


# === protobuf, as far as these messages need it ===


def varint(number):
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


def read_varint(data, at):
    number = shift = 0
    while True:
        number |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return number, at


def fields(data):
    """The values of each field by its number: ints, or bytes."""
    found, at = {}, 0
    while at < len(data):
        tag, at = read_varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = read_varint(data, at)
        elif kind == 2:
            length, at = read_varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"field {number} is of wire type {kind}, which no message here has")
        found.setdefault(number, []).append(value)
    return found


def one(message, number, default):
    return message.get(number, [default])[-1]


def in_field(number, value):
    return varint(number << 3 | 2) + varint(len(value)) + value


def payload(size):
    """A response with that much, in its field 1; a payload has its bytes in field 2."""
    return in_field(1, in_field(2, bytes(size)))


def size_of_payload(message, number):
    return len(one(fields(one(message, number, b"")), 2, b""))


# === the service ===


def echo_metadata(context):
    for key, value in context.invocation_metadata():
        if key == "x-grpc-test-echo-initial":
            context.send_initial_metadata([(key, value)])
        elif key == "x-grpc-test-echo-trailing-bin":
            context.set_trailing_metadata([(key, value)])


def end_as_asked(message, context):
    """Ends the call with the status in field 7, if there is one."""
    status = fields(one(message, 7, b""))
    code = one(status, 1, 0)
    if code:
        words = one(status, 2, b"").decode()
        context.abort(next(known for known in grpc.StatusCode if known.value[0] == code), words)


def empty_call(_, context):
    echo_metadata(context)
    return b""


def unary_call(request, context):
    echo_metadata(context)
    message = fields(request)
    end_as_asked(message, context)
    return payload(one(message, 2, 0))


def output_call(request, context):
    echo_metadata(context)
    yield from answers(request, context)


def input_call(requests, context):
    echo_metadata(context)
    total = sum(size_of_payload(fields(request), 1) for request in requests)
    return varint(1 << 3) + varint(total)


def duplex_call(requests, context):
    echo_metadata(context)
    for request in requests:
        yield from answers(request, context)


def answers(request, context):
    message = fields(request)
    end_as_asked(message, context)
    for parameters in map(fields, message.get(2, [])):
        time.sleep(one(parameters, 2, 0) / 1e6)
        yield payload(one(parameters, 1, 0))


# What is not here is unimplemented, as is every other service.
SERVICE = grpc.method_handlers_generic_handler(
    "grpc.testing.TestService",
    {
        "EmptyCall": grpc.unary_unary_rpc_method_handler(empty_call),
        "UnaryCall": grpc.unary_unary_rpc_method_handler(unary_call),
        "StreamingOutputCall": grpc.unary_stream_rpc_method_handler(output_call),
        "StreamingInputCall": grpc.stream_unary_rpc_method_handler(input_call),
        "FullDuplexCall": grpc.stream_stream_rpc_method_handler(duplex_call),
    },
)


def contents(path):
    with open(path, "rb") as file:
        return file.read()


def main(certificate, key):
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=THREADS))
    server.add_generic_rpc_handlers((SERVICE,))
    identity = grpc.ssl_server_credentials([(contents(key), contents(certificate))])
    plaintext = server.add_insecure_port("127.0.0.1:0")
    tls = server.add_secure_port("127.0.0.1:0", identity)
    server.start()
    print(plaintext, tls, flush=True)
    sys.stdin.read()
    server.stop(None)


main(*sys.argv[1:])
