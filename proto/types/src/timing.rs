//! Times that coordinator and workers must agree about.

use std::time::Duration;

/// How often a worker tells that it lives.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// How long the coordinator gives the members of a new group to connect to each other.
pub const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// When a member gives that up by itself, so that it can say with whom it could not connect.
pub const FORM_WITHIN: Duration = Duration::from_secs(4);

const _: () = assert!(FORM_WITHIN.as_millis() < CONNECT_WITHIN.as_millis());
