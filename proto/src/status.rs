//! Maps error kinds to gRPC status codes and back.

use tonic::{Code, Status};
use ulmus_types::ErrorKind;

/// The status that tells the other side what it can do about the error.
pub fn status_of(kind: ErrorKind, message: impl Into<String>) -> Status {
    let code = match kind {
        ErrorKind::Retry => Code::Unavailable,
        ErrorKind::Fenced => Code::Aborted,
        ErrorKind::InvalidInput => Code::InvalidArgument,
        ErrorKind::Refused => Code::FailedPrecondition,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::Disk => Code::ResourceExhausted,
        ErrorKind::Internal => Code::Internal,
    };
    Status::new(code, message)
}

/// What can be done about an error with this status.
pub fn kind_of(status: &Status) -> ErrorKind {
    match status.code() {
        Code::Aborted => ErrorKind::Fenced,
        Code::InvalidArgument | Code::Unimplemented | Code::OutOfRange => ErrorKind::InvalidInput,
        Code::FailedPrecondition | Code::PermissionDenied | Code::Unauthenticated => ErrorKind::Refused,
        Code::DataLoss => ErrorKind::Corrupt,
        Code::ResourceExhausted => ErrorKind::Disk,
        Code::Internal => ErrorKind::Internal,
        _ => ErrorKind::Retry,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_survive_the_wire() {
        for kind in [
            ErrorKind::Retry,
            ErrorKind::Fenced,
            ErrorKind::InvalidInput,
            ErrorKind::Refused,
            ErrorKind::Corrupt,
            ErrorKind::Disk,
            ErrorKind::Internal,
        ] {
            assert_eq!(kind_of(&status_of(kind, "")), kind);
        }
    }
}
