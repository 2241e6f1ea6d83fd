//! The test kit: in-process clusters and real processes
