//! The runtime on which all stores of the process are read and written.

use std::sync::LazyLock;

use tokio::runtime::Runtime;

pub(super) static IO: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("ulmus-data-io")
        .enable_all()
        .build()
        .expect("a thread for reading can be started")
});

/// Waits for what the runtime does. Must not be called from async code.
pub(crate) fn wait_for<T>(operation: impl Future<Output = T>) -> T {
    IO.block_on(operation)
}
