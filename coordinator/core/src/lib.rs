//! The coordinator as a pure state machine
