//! What the harness leaves to Python, where another language would do something else.

pub(crate) mod literal;
pub(crate) mod random;
pub(crate) mod string;
