//! From raw public corpora to training sequences, exact and resumable
