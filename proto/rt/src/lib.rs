//! Process matters: telemetry, clock, shutdown
