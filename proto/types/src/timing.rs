//! Times on which coordinator and workers must agree.

use std::time::Duration;

/// How often a worker sends a heartbeat.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// How long the members of a new group have to connect to each other, as the coordinator sees it.
pub const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// How long a member itself tries to connect. It is shorter, so that the member can still report which peer it could
/// not reach.
pub const FORM_WITHIN: Duration = Duration::from_secs(4);

const _: () = assert!(FORM_WITHIN.as_millis() < CONNECT_WITHIN.as_millis());
