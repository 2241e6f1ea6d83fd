//! Times and numbers on which coordinator and workers must agree.

use std::time::Duration;

/// How often a worker sends a heartbeat.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// The number of states that may wait in a worker's memory to be stored; a third makes training wait.
pub const SNAPSHOT_SLOTS: usize = 2;

/// How long the members of a new group have to connect to each other, as the coordinator sees it.
pub const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// How long a member itself tries to connect. It is shorter, so that the member can still report which peer it could
/// not reach.
pub const FORM_WITHIN: Duration = Duration::from_secs(4);

const _: () = assert!(FORM_WITHIN.as_millis() < CONNECT_WITHIN.as_millis());

/// How long a worker that was once welcomed looks for its coordinator.
pub const COORDINATOR_TIMEOUT: Duration = Duration::from_mins(5);

/// How long an operation on a file of a run is retried.
pub const RUN_STORE_DEADLINE: Duration = Duration::from_secs(25);

/// How long the process of a worker that forms a group may be stuck: it reads a state, or waits for others that do.
pub const FORM_STILL_FOR: Duration = Duration::from_secs(30);

/// How long a single request to the store of a run may take.
pub const RUN_STORE_REQUEST: Duration = Duration::from_mins(1);

/// How long a worker may take to read the store's nonce.
pub const GREETED_WITHIN: Duration = Duration::from_secs(90);

// A store that does not answer is the worker's error, not its end.
const _: () = assert!(RUN_STORE_DEADLINE.as_millis() < FORM_STILL_FOR.as_millis());
const _: () = assert!(RUN_STORE_REQUEST.as_millis() < GREETED_WITHIN.as_millis());
