//! The gRPC contract between coordinator and workers
