//! `grpc.health.v1`: the states of a process's components, for those who ask from outside.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::Stream;
use futures_util::stream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_server::Health,
};

use crate::manager::Components;

/// Answers [`grpc.health.v1`](https://github.com/grpc/grpc/blob/master/doc/health-checking.md) for all components of a
/// process that share a manager; [`Component::health`](super::Component::health) makes it.
///
/// | service asked for | `SERVING` while |
/// | --- | --- |
/// | a component's role | it is `Healthy`, and so many of the roles it [needs](super::Builder::serving_needs) are ready |
/// | the empty one: overall | every component is `Healthy` or `StandBy`, and has what it needs |
///
/// One that stands by counts as well overall, because a rolling update that waits for the new one to be well before it
/// ends the old one would otherwise wait for ever. No caller is led to it: it is not registered.
///
/// For any other service `Check` is `NOT_FOUND`, and `Watch` says `SERVICE_UNKNOWN` until there is one. A `Watch` tells
/// `NOT_SERVING` and ends when the server begins to drain: an open one would hold the server up until its bound. Clients of
/// this crate watch it with `HealthCheck::Role` (feature `health`).
#[derive(Clone)]
pub struct HealthService {
    components: Arc<Components>,
    draining: CancellationToken,
}

/// What a `Watch` of [`HealthService`] yields: how it is now, then each change. A slow reader misses those in between.
pub struct HealthWatch {
    inner: Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>,
}

// === impl HealthService ===

impl HealthService {
    pub(super) fn new(components: Arc<Components>, draining: CancellationToken) -> Self {
        Self {
            components,
            draining,
        }
    }

    fn status(&self, service: &str) -> ServingStatus {
        let all = self.components.all();
        let serving = match service {
            "" => {
                // One that has stopped is no part of the process any more, whoever still holds it.
                let mut there = all.iter().filter(|c| !c.has_stopped()).peekable();
                there.peek().is_some() && there.all(|c| c.is_well())
            }
            role if all.iter().any(|c| c.role() == role) => {
                all.iter().any(|c| c.role() == role && c.is_serving())
            }
            token if all.iter().any(|c| c.is_asked_by_itself(token)) => true,
            _ => return ServingStatus::ServiceUnknown,
        };
        match serving {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        }
    }

    fn watched(self, service: String) -> impl Stream<Item = Result<HealthCheckResponse, Status>> {
        let changes = self.components.changes();
        let first = (self, service, changes, None, false);
        stream::unfold(first, async |(health, service, mut changes, told, over)| {
            if over {
                return None;
            }
            loop {
                // From here on: what changes while it is looked at is looked at again.
                changes.mark_unchanged();
                let over = health.draining.is_cancelled();
                let status = health.status(&service);
                if told != Some(status) {
                    let told = Some(status);
                    return Some((Ok(answer(status)), (health, service, changes, told, over)));
                }
                if over {
                    return None;
                }
                tokio::select! {
                    () = health.draining.cancelled() => {}
                    changed = changes.changed() => changed.ok()?,
                }
            }
        })
    }
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        match self.status(&service) {
            ServingStatus::ServiceUnknown => Err(Status::not_found(format!(
                "no component of role {service:?} runs here"
            ))),
            status => Ok(Response::new(answer(status))),
        }
    }

    type WatchStream = HealthWatch;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthWatch>, Status> {
        let watched = self.clone().watched(request.into_inner().service);
        Ok(Response::new(HealthWatch {
            inner: Box::pin(watched),
        }))
    }
}

impl fmt::Debug for HealthService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthService").finish_non_exhaustive()
    }
}

// === impl HealthWatch ===

impl Stream for HealthWatch {
    type Item = Result<HealthCheckResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.as_mut().poll_next(cx)
    }
}

impl fmt::Debug for HealthWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthWatch").finish_non_exhaustive()
    }
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse {
        status: status.into(),
    }
}
