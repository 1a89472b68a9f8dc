//! What a call keeps of its request, to make it again.

use std::time::Duration;

use http::{
    Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version,
    header::{CONTENT_TYPE, TE},
    request::Parts,
    uri::{self, Authority, PathAndQuery, Scheme},
};
use tonic::GrpcMethod;

use super::body::{Body, Source};
use crate::{
    deadline::{GRPC_TIMEOUT, header_of},
    waiters::{NEVER, now},
};

/// Tells a server how often the call was tried before
/// ([A6](https://github.com/grpc/proposal/blob/master/A6-client-retries.md)).
pub(super) const PREVIOUS_ATTEMPTS: HeaderName =
    HeaderName::from_static("grpc-previous-rpc-attempts");

const TRAILERS: &str = "trailers";
const GRPC: &str = "application/grpc";

/// A request, without what can be told again.
///
/// A header map is not cloned if it can be helped. Most calls have none but gRPC's own headers, which are known.
#[derive(Debug)]
pub(super) struct Kept {
    method: Method,
    path: Option<PathAndQuery>,
    // Few have one, before they are given one that is their connection's.
    origin: Option<Box<(Option<Scheme>, Option<Authority>)>>,
    version: Version,
    te: bool,
    content_type: bool,
    /// Those that are not gRPC's own.
    headers: Option<Box<HeaderMap>>,
    grpc_method: Option<GrpcMethod<'static>>,
    /// If there are others.
    extensions: Option<Box<Extensions>>,
    pub(super) source: Source,
    /// When its time is up, or never.
    pub(super) at: u64,
    /// It is repeated here by a policy.
    pub(super) owned: bool,
    /// It is for the throttle here, whether it is repeated or not: nobody outside repeats it.
    pub(super) counted: bool,
}

/// Whether there is nothing but tonic's own word for the method, as in most calls.
#[inline]
pub(crate) fn is_bare(extensions: &Extensions) -> bool {
    match extensions.len() {
        0 => true,
        1 => extensions.get::<GrpcMethod<'static>>().is_some(),
        _ => false,
    }
}

// === impl Kept ===

impl Kept {
    pub(super) fn of(head: &Parts, source: Source, at: u64) -> Self {
        let mut kept = Self {
            method: head.method.clone(),
            path: head.uri.path_and_query().cloned(),
            origin: match (head.uri.scheme(), head.uri.authority()) {
                (None, None) => None,
                (scheme, authority) => Some(Box::new((scheme.cloned(), authority.cloned()))),
            },
            version: head.version,
            te: false,
            content_type: false,
            headers: None,
            grpc_method: None,
            extensions: None,
            source,
            at,
            owned: false,
            counted: false,
        };
        for (name, value) in &head.headers {
            if name == TE && value == TRAILERS {
                kept.te = true;
            } else if name == CONTENT_TYPE && value == GRPC {
                kept.content_type = true;
            } else if name == GRPC_TIMEOUT && at != NEVER {
                // What remains of it is told.
            } else {
                let headers = kept.headers.get_or_insert_default();
                headers.append(name, value.clone());
            }
        }
        let extensions = &head.extensions;
        match extensions.len() {
            0 => {}
            1 if let Some(method) = extensions.get::<GrpcMethod<'static>>() => {
                kept.grpc_method = Some(method.clone());
            }
            _ => kept.extensions = Some(Box::new(extensions.clone())),
        }
        kept
    }

    pub(super) fn path(&self) -> &str {
        self.path.as_ref().map_or("/", PathAndQuery::path)
    }

    /// Whether there is more among its extensions than tonic's word for its method.
    pub(super) const fn has_options(&self) -> bool {
        self.extensions.is_some()
    }

    pub(super) fn extension<T: Clone + Send + Sync + 'static>(&self) -> Option<&T> {
        self.extensions.as_ref()?.get()
    }

    /// For the attempts to come.
    pub(super) fn add<T: Clone + Send + Sync + 'static>(&mut self, extension: T) {
        let extensions = self.extensions.get_or_insert_default();
        if let Some(method) = self.grpc_method.take() {
            extensions.insert(method);
        }
        extensions.insert(extension);
    }

    /// Whether its time is up.
    pub(super) fn is_expired(&self) -> bool {
        self.at != NEVER && now() >= self.at
    }

    /// The request once more, after so many attempts that count; none if its body cannot be sent again.
    pub(super) fn again(&self, attempts: u32) -> Option<Request<Body>> {
        let mut request = Request::new(self.source.again()?);
        *request.method_mut() = self.method.clone();
        let mut uri = uri::Parts::default();
        uri.path_and_query = self.path.clone();
        if let Some(origin) = &self.origin {
            (uri.scheme, uri.authority) = (**origin).clone();
        }
        // It is what was taken apart.
        *request.uri_mut() = Uri::from_parts(uri).ok()?;
        *request.version_mut() = self.version;
        let headers = request.headers_mut();
        if let Some(kept) = &self.headers {
            headers.clone_from(kept);
        }
        if self.te {
            headers.insert(TE, HeaderValue::from_static(TRAILERS));
        }
        if self.content_type {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(GRPC));
        }
        if self.at != NEVER {
            let left = Duration::from_nanos(self.at.saturating_sub(now()));
            headers.insert(GRPC_TIMEOUT, header_of(left));
        }
        if attempts > 0 {
            headers.insert(PREVIOUS_ATTEMPTS, HeaderValue::from(attempts));
        }
        if let Some(extensions) = &self.extensions {
            request.extensions_mut().clone_from(extensions);
        } else if let Some(method) = &self.grpc_method {
            request.extensions_mut().insert(method.clone());
        }
        Some(request)
    }
}
