//! The generated code that is kept, so that no build needs protoc, is what the protos say.
//!
//! `UPDATE=1 cargo test --test generated` writes it anew.

use std::{fs, path::Path};

fn generate(proto: &str, client_only: bool) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile([proto], [root.join("proto")]).expect("the proto compiles");
    let out = std::env::temp_dir().join(format!("switchboard-gen-{}-{proto}", std::process::id()));
    fs::create_dir_all(&out).expect("a folder to write to");
    tonic_prost_build::configure()
        .build_server(!client_only)
        .build_transport(false)
        .bytes(".")
        .out_dir(&out)
        .compile_fds(descriptors)
        .expect("the code is generated");
    let mut files = fs::read_dir(&out).expect("the folder is there");
    let file = files.next().expect("one file").expect("it can be read");
    let code = fs::read_to_string(file.path()).expect("it is text");
    fs::remove_dir_all(&out).expect("the folder can be removed");
    code
}

fn is_current(proto: &str, client_only: bool, kept: &str) {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join(kept);
    let new = generate(proto, client_only);
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&kept, &new).expect("the kept code can be written");
    }
    let old = fs::read_to_string(&kept).unwrap_or_default();
    assert!(
        old == new,
        "{} is not what {proto} generates; run UPDATE=1 cargo test --test generated",
        kept.display()
    );
}

#[test]
fn the_demo_service_is_current() {
    is_current("echo.proto", false, "proto/gen/echo.rs");
}

#[test]
fn the_etcd_client_is_current() {
    is_current("etcd.proto", true, "proto/gen/etcd.rs");
}

#[test]
fn grpcs_test_service_is_current() {
    is_current("test.proto", false, "proto/gen/test.rs");
}
