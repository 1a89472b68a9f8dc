//! The generated Echo service.

#![allow(unreachable_pub, missing_docs, unused_qualifications)]

include!(concat!(env!("CARGO_MANIFEST_DIR"), "/proto/gen/echo.rs"));
