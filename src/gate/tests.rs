use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use http::Response;
use tokio::{sync::oneshot, time::timeout};
use tonic::{Code, Status};
use tower::{Layer as _, Service, ServiceBuilder, ServiceExt as _, service_fn};

use super::{core::Phase, *};
use crate::error::{BoxError, Sent};

type Answer = Result<&'static str, BoxError>;

/// A call brings what it is to be answered with.
type Ask = oneshot::Receiver<Answer>;

/// Answers with what it is given, and minds whether it was polled ready before.
#[derive(Default)]
struct Inner {
    seen: Arc<Seen>,
    polled: bool,
}

#[derive(Default)]
struct Seen {
    polls: AtomicUsize,
    calls: AtomicUsize,
    stuck: AtomicBool,
}

impl Inner {
    fn gated(self, gate: &Gate) -> Gated<Self> {
        ServiceBuilder::new()
            .layer(GateLayer::new(gate.clone()))
            .service(self)
    }
}

impl Clone for Inner {
    fn clone(&self) -> Self {
        Self {
            seen: self.seen.clone(),
            polled: false,
        }
    }
}

impl Service<Ask> for Inner {
    type Response = &'static str;
    type Error = BoxError;
    type Future = BoxFuture<'static, Answer>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.seen.polls.fetch_add(1, Ordering::Relaxed);
        if self.seen.stuck.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        self.polled = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, ask: Ask) -> Self::Future {
        assert!(self.polled, "called without having been polled ready");
        self.polled = false;
        self.seen.calls.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move { ask.await.unwrap_or(Ok("nobody asks any more")) })
    }
}

/// A request that is answered with this at once.
fn ask(answer: Answer) -> Ask {
    let (tell, ask) = oneshot::channel();
    tell.send(answer).unwrap();
    ask
}

fn refused() -> Answer {
    Err(io::Error::from(io::ErrorKind::ConnectionRefused).into())
}

/// Polls it ready, which must not take time.
fn polled(service: &mut Gated<Inner>) -> &mut Gated<Inner> {
    let ready = service.ready().now_or_never();
    ready.expect("ready at once").expect("no error")
}

/// A call that must not take time.
fn call(service: &mut Gated<Inner>, answer: Answer) -> Result<&'static str, Error> {
    let done = polled(service).call(ask(answer)).now_or_never();
    done.expect("done at once")
}

fn half_open() -> (Gate, Gated<Inner>) {
    let gate = Gate::new();
    assert!(gate.shut("maintenance"));
    assert!(gate.half_open());
    let service = Inner::default().gated(&gate);
    (gate, service)
}

#[track_caller]
fn assert_shut(error: &Error, text: &str) {
    assert_eq!(error.kind(), Kind::Shut, "{error}");
    assert_eq!(error.sent(), Sent::Unsent);
    assert_eq!(error.code(), Code::Unavailable);
    assert_eq!(error.to_string(), text);
}

#[test]
fn an_open_gate_passes_calls_and_their_errors() {
    let gate = Gate::new();
    let mut service = Inner::default().gated(&gate);
    assert_eq!(call(&mut service, Ok("hello")).unwrap(), "hello");
    let error = call(&mut service, refused()).unwrap_err();
    assert_eq!(error.kind(), Kind::Service);
    // It judges nobody but probes.
    assert_eq!(gate.state(), GateState::Open);
    // An error of this crate comes through as it is.
    let ours = Error::new(Kind::NoSession).into();
    let error = call(&mut service, Err(ours)).unwrap_err();
    assert_eq!(error.kind(), Kind::NoSession);
}

#[test]
fn a_shut_gate_fails_calls_at_once_and_leaves_the_service_alone() {
    let gate = Gate::new();
    let mut service = Inner::default().gated(&gate);
    let seen = service.get_ref().seen.clone();
    seen.stuck.store(true, Ordering::Relaxed);
    gate.shut("maintenance");
    for _ in 0..3 {
        let error = call(&mut service, Ok("hello")).unwrap_err();
        assert_shut(&error, "gate shut: maintenance");
    }
    assert_eq!(seen.polls.load(Ordering::Relaxed), 0);
    assert_eq!(seen.calls.load(Ordering::Relaxed), 0);
    assert!(gate.open());
    seen.stuck.store(false, Ordering::Relaxed);
    assert_eq!(call(&mut service, Ok("hello")).unwrap(), "hello");
}

#[test]
fn the_first_who_shuts_it_says_why() {
    let gate = Gate::new();
    assert!(!gate.open() && !gate.half_open() && gate.is_open());
    assert!(gate.shut("lease expired"));
    assert!(!gate.shut("connection lost"));
    assert_eq!(gate.state().to_string(), "shut: lease expired");
    assert!(gate.half_open());
    assert!(!gate.half_open());
    assert_eq!(gate.state().to_string(), "half open: lease expired");
    // It is another time that it is shut.
    assert!(gate.shut(String::from("drained")));
    assert_eq!(gate.state().to_string(), "shut: drained");
    assert!(gate.open());
    assert_eq!(gate.state().to_string(), "open");
    let unnamed = Gate::default();
    unnamed.shut("");
    assert_eq!(unnamed.state().to_string(), "shut");
    assert_shut(&unnamed.refusal(), "gate shut");
}

#[test]
fn calls_under_way_go_on_when_the_gate_shuts() {
    let gate = Gate::new();
    let mut service = Inner::default().gated(&gate);
    let (tell, ask) = oneshot::channel();
    let mut pending = polled(&mut service).call(ask);
    assert!((&mut pending).now_or_never().is_none());
    gate.shut("maintenance");
    assert!(call(&mut service, Ok("new")).is_err());
    assert!((&mut pending).now_or_never().is_none());
    tell.send(Ok("old")).unwrap();
    assert_eq!(pending.now_or_never().unwrap().unwrap(), "old");
    assert!(!gate.is_open());
}

#[test]
fn a_good_probe_opens_a_bad_one_shuts_for_the_old_reason_and_its_own() {
    let (gate, mut service) = half_open();
    for _ in 0..3 {
        let error = call(&mut service, refused()).unwrap_err();
        assert_eq!(error.kind(), Kind::Service, "the probe's own error");
        let error = call(&mut service, Ok("hello")).unwrap_err();
        assert_shut(
            &error,
            "gate shut: maintenance (last probe: call failed: connection refused)",
        );
        assert!(gate.half_open());
    }
    assert_eq!(call(&mut service, Ok("hello")).unwrap(), "hello");
    assert_eq!(gate.state(), GateState::Open);
    // What a probe said long ago is no reason for the next time.
    gate.shut("maintenance");
    assert_shut(&gate.refusal(), "gate shut: maintenance");
}

#[test]
fn a_bad_response_shuts_too() {
    let gate = Gate::new();
    gate.shut("starting");
    gate.half_open();
    let layer =
        GateLayer::new(gate.clone()).classify(|outcome: &Result<u32, Error>| match outcome {
            Ok(0) => Verdict::Bad,
            _ => Verdict::Good,
        });
    let mut service = layer.layer(service_fn(|n: u32| async move { Ok::<_, Error>(n) }));
    let served = service.ready().now_or_never().unwrap().unwrap().call(0);
    assert_eq!(served.now_or_never().unwrap().unwrap(), 0);
    assert_eq!(
        gate.state().to_string(),
        "shut: starting (last probe: its response is a bad one)"
    );
}

#[test]
fn a_probe_without_a_verdict_gives_its_slot_back() {
    let (gate, mut service) = half_open();
    // Dropped: unpolled, and pending.
    drop(polled(&mut service).call(ask(Ok("hello"))));
    let (_tell, ask) = oneshot::channel();
    let mut probe = polled(&mut service).call(ask);
    assert!((&mut probe).now_or_never().is_none());
    let error = call(&mut service, Ok("hello")).unwrap_err();
    assert_shut(&error, "gate shut: maintenance");
    drop(probe);
    // Unknown.
    let busy = Error::new(Kind::Busy).into();
    let error = call(&mut service, Err(busy)).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{error}");
    assert!(matches!(gate.state(), GateState::HalfOpen { .. }));
    assert_eq!(call(&mut service, Ok("hello")).unwrap(), "hello");
    assert!(gate.is_open());
}

#[test]
fn a_probe_that_panics_gives_its_slot_back() {
    let gate = Gate::new();
    gate.shut("maintenance");
    gate.half_open();
    let layer = GateLayer::new(gate.clone());
    let mut in_call = layer.layer(service_fn(|(): ()| -> std::future::Ready<Answer> {
        panic!("in the call")
    }));
    let mut in_future = layer.layer(service_fn(|(): ()| {
        std::future::poll_fn(|_| -> Poll<Answer> { panic!("in the future") })
    }));
    in_call.ready().now_or_never().unwrap().unwrap();
    let panicked = catch_unwind(AssertUnwindSafe(|| drop(in_call.call(()))));
    assert!(panicked.is_err());
    in_future.ready().now_or_never().unwrap().unwrap();
    let panicked = catch_unwind(AssertUnwindSafe(|| in_future.call(()).now_or_never()));
    assert!(panicked.is_err());
    assert!(matches!(gate.state(), GateState::HalfOpen { .. }));
    let mut service = Inner::default().gated(&gate);
    assert_eq!(call(&mut service, Ok("hello")).unwrap(), "hello");
    assert!(gate.is_open());
}

#[test]
fn a_probe_decides_nothing_once_the_gate_was_flipped() {
    type Flip = fn(&Gate);
    let flips: [(Flip, &str); 3] = [
        (|gate| assert!(gate.open()), "open"),
        (|gate| assert!(gate.shut("drained")), "shut: drained"),
        (
            |gate| assert!(gate.shut("drained") && gate.half_open()),
            "half open: drained",
        ),
    ];
    let busy = || Err(Error::new(Kind::Busy).into());
    let outcomes: [fn() -> Option<Answer>; 4] = [
        || Some(Ok("hello")),
        || Some(refused()),
        || Some(Err(Error::new(Kind::Busy).into())),
        || None,
    ];
    for (flip, expected) in flips {
        for outcome in outcomes {
            let (gate, mut service) = half_open();
            let (tell, ask) = oneshot::channel();
            let probe = polled(&mut service).call(ask);
            flip(&gate);
            // Where the slot is free again, another has it when the first probe ends.
            let mut other = service.clone();
            let (_hold, ask) = oneshot::channel();
            let second = expected
                .starts_with("half")
                .then(|| polled(&mut other).call(ask));
            match outcome() {
                Some(answer) => {
                    tell.send(answer).unwrap();
                    let _ = probe.now_or_never().unwrap();
                }
                None => drop(probe),
            }
            assert_eq!(gate.state().to_string(), expected);
            if second.is_some() {
                let error = call(&mut service, Ok("hello")).unwrap_err();
                assert_shut(&error, "gate shut: drained");
                drop(second);
                let error = call(&mut service, busy()).unwrap_err();
                assert_eq!(error.kind(), Kind::Busy, "{error}");
            }
        }
    }
}

#[test]
fn a_gate_that_opens_between_poll_ready_and_call_fails_that_call() {
    let flips: [fn(&Gate) -> bool; 2] = [Gate::open, Gate::half_open];
    for flip in flips {
        let gate = Gate::new();
        let mut service = Inner::default().gated(&gate);
        gate.shut("maintenance");
        polled(&mut service);
        assert!(flip(&gate));
        // The service inside would panic.
        let error = service.call(ask(Ok("hello"))).now_or_never().unwrap();
        assert_shut(&error.unwrap_err(), "gate shut: maintenance");
        // And it took no probe's slot.
        assert_eq!(call(&mut service, Ok("hello")).unwrap(), "hello");
    }
}

#[test]
fn a_gate_that_shuts_between_poll_ready_and_call_fails_that_call() {
    let gate = Gate::new();
    let mut service = Inner::default().gated(&gate);
    polled(&mut service);
    gate.shut("maintenance");
    let error = service.call(ask(Ok("hello"))).now_or_never().unwrap();
    assert_shut(&error.unwrap_err(), "gate shut: maintenance");
    // Open again, but this clone has not asked since, or has been told to wait.
    gate.open();
    let error = service.call(ask(Ok("hello"))).now_or_never().unwrap();
    assert_eq!(error.unwrap_err().kind(), Kind::Internal);
    polled(&mut service);
    service.get_ref().seen.stuck.store(true, Ordering::Relaxed);
    assert!(service.ready().now_or_never().is_none());
    let error = service.call(ask(Ok("hello"))).now_or_never().unwrap();
    assert_eq!(error.unwrap_err().kind(), Kind::Internal);
}

#[test]
fn a_clone_has_the_same_gate_and_a_readiness_of_its_own() {
    let gate = Gate::new();
    let mut service = Inner::default().gated(&gate);
    polled(&mut service);
    let mut clone = service.clone();
    let error = clone.call(ask(Ok("hello"))).now_or_never().unwrap();
    let error = error.unwrap_err();
    assert_eq!(
        error.to_string(),
        "internal error: called before it was ready"
    );
    assert_eq!(call(&mut clone, Ok("hello")).unwrap(), "hello");
    gate.shut("maintenance");
    assert!(call(&mut clone, Ok("hello")).is_err());
    assert!(call(&mut service, Ok("hello")).is_err());
}

#[tokio::test]
async fn a_wait_for_the_service_ends_when_the_gate_shuts() {
    let gate = Gate::new();
    let mut service = Inner::default().gated(&gate);
    service.get_ref().seen.stuck.store(true, Ordering::Relaxed);
    let waiting = tokio::spawn(async move {
        let error = service.ready().await?.call(ask(Ok("hello"))).await;
        error.map(drop)
    });
    tokio::task::yield_now().await;
    // Opened again before the waiter has looked: it waits on.
    gate.shut("a moment");
    gate.open();
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    gate.shut("maintenance");
    let ended = timeout(Duration::from_secs(10), waiting).await;
    let error = ended.expect("it ends").unwrap().unwrap_err();
    assert_shut(&error, "gate shut: maintenance");
}

#[tokio::test]
async fn a_wait_for_the_service_ends_when_another_is_the_probe() {
    let (_gate, mut service) = half_open();
    let mut other = service.clone();
    let (_tell, asked) = oneshot::channel();
    let ready = polled(&mut other);
    service.get_ref().seen.stuck.store(true, Ordering::Relaxed);
    let waiting = tokio::spawn(async move {
        let error = service.ready().await?.call(ask(Ok("hello"))).await;
        error.map(drop)
    });
    tokio::task::yield_now().await;
    let _probe = ready.call(asked);
    let ended = timeout(Duration::from_secs(10), waiting).await;
    let error = ended.expect("it ends").unwrap().unwrap_err();
    assert_shut(&error, "gate shut: maintenance");
}

#[tokio::test]
async fn it_stands_in_a_stack_with_others() {
    let gate = Gate::new();
    let (inner, seen) = (Inner::default(), Arc::new(Seen::default()));
    let inner = Inner {
        seen: seen.clone(),
        ..inner
    };
    let service = ServiceBuilder::new()
        .buffer(4)
        .load_shed()
        .layer(GateLayer::new(gate.clone()))
        .load_shed()
        .timeout(Duration::from_millis(1))
        .service(inner);
    let send = |ask| service.clone().oneshot(ask);
    assert_eq!(send(ask(Ok("hello"))).await.unwrap(), "hello");
    // Shut while the service is stuck: the buffer goes on, and does not shed instead.
    seen.stuck.store(true, Ordering::Relaxed);
    gate.shut("maintenance");
    for _ in 0..10 {
        let error = send(ask(Ok("hello"))).await.unwrap_err();
        assert_shut(Error::of(&*error).unwrap(), "gate shut: maintenance");
    }
    // Half open: that the inner stack sheds, or is late, says nothing of the server.
    gate.half_open();
    let error = send(ask(Ok("hello"))).await.unwrap_err();
    assert_eq!(Error::of(&*error).unwrap().kind(), Kind::Service, "{error}");
    seen.stuck.store(false, Ordering::Relaxed);
    let (_tell, late) = oneshot::channel();
    let error = send(late).await.unwrap_err();
    assert_eq!(Error::of(&*error).unwrap().kind(), Kind::Service, "{error}");
    assert_eq!(gate.state().to_string(), "half open: maintenance");
    // A caller with a timeout of its own is a probe that is dropped.
    let impatient = ServiceBuilder::new()
        .timeout(Duration::from_millis(1))
        .layer(GateLayer::new(gate.clone()))
        .service(Inner::default());
    let (_tell, late) = oneshot::channel();
    assert!(impatient.oneshot(late).await.is_err());
    assert_eq!(send(ask(Ok("hello"))).await.unwrap(), "hello");
    assert!(gate.is_open());
}

#[test]
fn what_is_not_the_services_failing_says_nothing_of_it() {
    #[derive(Debug)]
    struct Wrapped(BoxError);
    impl fmt::Display for Wrapped {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("wrapped")
        }
    }
    impl std::error::Error for Wrapped {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&*self.0)
        }
    }
    let verdict = |error: BoxError| OkIsGood.classify(&Err::<(), _>(Error::from_service(error)));
    let cases: Vec<(fn() -> BoxError, Verdict)> = vec![
        (|| Error::new(Kind::Stopped).into(), Verdict::Unknown),
        (
            || Error::new(Kind::DeadlineExceeded).into(),
            Verdict::Unknown,
        ),
        (|| Error::new(Kind::Busy).into(), Verdict::Unknown),
        (|| Error::new(Kind::Limit).into(), Verdict::Unknown),
        (|| Error::new(Kind::RequestBody).into(), Verdict::Unknown),
        (|| Status::cancelled("gone").into(), Verdict::Unknown),
        (
            || Status::deadline_exceeded("late").into(),
            Verdict::Unknown,
        ),
        (
            || Status::resource_exhausted("full").into(),
            Verdict::Unknown,
        ),
        (
            || tower::timeout::error::Elapsed::new().into(),
            Verdict::Unknown,
        ),
        (
            || tower::load_shed::error::Overloaded::new().into(),
            Verdict::Unknown,
        ),
        (|| Error::new(Kind::ConnectionLost).into(), Verdict::Bad),
        (|| Error::new(Kind::SessionDeleted).into(), Verdict::Bad),
        (|| Status::unavailable("down").into(), Verdict::Bad),
        (|| io::Error::other("broken").into(), Verdict::Bad),
    ];
    for (error, expected) in cases {
        let text = error().to_string();
        assert_eq!(verdict(error()), expected, "{text}");
        assert_eq!(verdict(Wrapped(error()).into()), expected, "{text}");
        let status = Status::from_error(error());
        assert_eq!(verdict(status.into()), expected, "{text}, as a status");
    }
    assert_eq!(OkIsGood.classify(&Ok(())), Verdict::Good);
}

#[test]
fn of_grpc_answers_unavailable_alone_is_bad() {
    let verdict = |code: Option<&str>, status: u16| {
        let mut response = Response::builder().status(status);
        if let Some(code) = code {
            response = response.header("grpc-status", code);
        }
        GrpcStatus.classify(&Ok(response.body(()).unwrap()))
    };
    assert_eq!(verdict(Some("14"), 200), Verdict::Bad);
    assert_eq!(verdict(None, 503), Verdict::Bad);
    for good in ["0", "4", "5", "13", "nonsense"] {
        assert_eq!(verdict(Some(good), 200), Verdict::Good, "{good}");
    }
    assert_eq!(verdict(None, 200), Verdict::Good);
    assert_eq!(verdict(None, 404), Verdict::Good);
    let late = Err::<Response<()>, _>(Error::new(Kind::DeadlineExceeded));
    assert_eq!(GrpcStatus.classify(&late), Verdict::Unknown);
}

#[tokio::test]
async fn a_watch_misses_no_flip_and_tells_the_last() {
    let gate = Gate::new();
    let mut watch = gate.watch();
    assert!(watch.changed().now_or_never().is_none());
    gate.shut("one");
    gate.half_open();
    gate.shut("two");
    let state = watch.changed().now_or_never().expect("it was flipped");
    assert_eq!(state.to_string(), "shut: two");
    // A wait that was given up has told nothing, and the next one tells it.
    assert!(watch.changed().now_or_never().is_none());
    let mut given_up = Box::pin(watch.changed());
    let polled = given_up
        .as_mut()
        .poll_unpin(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_pending());
    gate.open();
    drop(given_up);
    assert_eq!(watch.changed().await, GateState::Open);
    // A probe that begins, and ends without a verdict, is no flip.
    gate.shut("three");
    gate.half_open();
    watch.changed().await;
    drop(gate.take_slot().expect("the slot is free"));
    assert!(watch.changed().now_or_never().is_none());
}

/// How often the races below are run.
const ROUNDS: usize = 2_000;

/// Waits for as many others, and spins: who had to be woken would come too late for any race.
fn start(arrived: &AtomicUsize, of: usize) {
    arrived.fetch_add(1, Ordering::SeqCst);
    let mut spins = 0_u32;
    while arrived.load(Ordering::SeqCst) < of {
        std::hint::spin_loop();
        spins += 1;
        // Where there are fewer processors, or they have other work.
        if spins.is_multiple_of(1_000) {
            thread::yield_now();
        }
    }
}

#[test]
fn of_many_at_once_one_is_the_probe() {
    const CALLERS: usize = 3;
    for round in 0..ROUNDS {
        let (gate, service) = half_open();
        let seen = service.get_ref().seen.clone();
        let (arrived, done) = (AtomicUsize::new(0), Barrier::new(CALLERS));
        thread::scope(|scope| {
            for _ in 0..CALLERS {
                let (mut service, gate) = (service.clone(), gate.clone());
                let (arrived, done, seen) = (&arrived, &done, &*seen);
                scope.spawn(move || {
                    let (tell, ask) = oneshot::channel();
                    polled(&mut service);
                    start(arrived, CALLERS);
                    let mut call = service.call(ask);
                    let ended = (&mut call).now_or_never();
                    done.wait();
                    let through = seen.calls.load(Ordering::Relaxed);
                    assert_eq!(through, 1, "in round {round}");
                    match ended {
                        Some(refused) => {
                            assert_shut(&refused.unwrap_err(), "gate shut: maintenance");
                        }
                        None => {
                            tell.send(Ok("hello")).unwrap();
                            assert!(call.now_or_never().unwrap().is_ok());
                            assert!(gate.is_open());
                        }
                    }
                });
            }
        });
    }
}

#[test]
fn in_a_storm_of_flips_a_slot_has_one_holder_and_is_never_lost() {
    let gate = Gate::new();
    // The holders of each epoch's slot; more epochs than can be in use at a time.
    let holders: Vec<AtomicU32> = (0..4096).map(|_| AtomicU32::new(0)).collect();
    let together = Barrier::new(4);
    thread::scope(|scope| {
        for flipper in [true, true, false, false] {
            let (gate, holders, together) = (&gate, &holders, &together);
            scope.spawn(move || {
                together.wait();
                for _ in 0..10 * ROUNDS {
                    let chance = fastrand::u8(..);
                    if flipper {
                        match chance {
                            0..64 => gate.open(),
                            64..128 => gate.shut("storm"),
                            _ => gate.half_open(),
                        };
                        continue;
                    }
                    let Some(epoch) = gate.core.take_slot() else {
                        continue;
                    };
                    let holder = &holders[usize::try_from(epoch).unwrap() % holders.len()];
                    assert_eq!(holder.fetch_add(1, Ordering::SeqCst), 0, "two probes");
                    holder.fetch_sub(1, Ordering::SeqCst);
                    match chance {
                        0..64 => gate.core.probed_good(epoch),
                        64..128 => gate.core.probed_bad(epoch, "storm".to_owned()),
                        _ => gate.core.return_slot(epoch),
                    }
                }
            });
        }
    });
    let phase = gate.core.look(|inside| inside.phase);
    assert_ne!(phase, Phase::Probing, "nobody holds it any more");
    assert_eq!(gate.is_open(), phase == Phase::Open, "the mirror is true");
    assert_eq!(gate.core.lets_through(), phase <= Phase::Vacant);
    gate.shut("over");
    gate.half_open();
    let slot = gate.take_slot();
    assert!(slot.is_some() && gate.take_slot().is_none());
}

#[test]
fn no_wait_misses_the_shut_that_it_races_with() {
    #[derive(Default)]
    struct Woken(AtomicBool);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    for round in 0..ROUNDS {
        let (core, arrived) = (Core::new(), AtomicUsize::new(0));
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let mut wait = pin!(core.went_shut());
        let late = round % 100;
        thread::scope(|scope| {
            let shutter = scope.spawn(|| {
                start(&arrived, 2);
                (0..late).for_each(|_| std::hint::spin_loop());
                assert!(core.shut("gone"));
                assert!(!core.shut("gone again"));
            });
            start(&arrived, 2);
            let first = wait.as_mut().poll(&mut Context::from_waker(&waker));
            shutter.join().unwrap();
            if first.is_pending() {
                let woken = woken.0.load(Ordering::SeqCst);
                assert!(woken, "nobody wakes it, in round {round}");
                assert!(wait.now_or_never().is_some());
            }
        });
        assert_eq!(core.reason(), "gone");
    }
}
