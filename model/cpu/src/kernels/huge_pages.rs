//! Memory that is read from one end to the other for every token: in large pages, where the system has them, because
//! looking up small ones costs a tenth of the bandwidth.

use std::alloc::{Layout, alloc, dealloc};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use ulmus_backend::BackendError;

use super::aligned::Line;

/// Size and alignment of a large page.
const LARGE: usize = 2 << 20;

/// A fixed number of lines.
pub(super) struct Pages {
    lines: NonNull<Line>,
    len: usize,
}

// SAFETY: owned plain data.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// That many lines of zeros.
    #[expect(clippy::cast_ptr_alignment, reason = "the layout is that of lines")]
    pub(super) fn zeroed(len: usize) -> Result<Self, BackendError> {
        if len == 0 {
            return Ok(Self { lines: NonNull::dangling(), len });
        }
        let bytes = len.saturating_mul(size_of::<Line>());
        let layout = Self::layout(bytes).ok_or(BackendError::OutOfMemory { bytes })?;
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc(layout) };
        let lines = NonNull::new(memory.cast::<Line>()).ok_or(BackendError::OutOfMemory { bytes })?;
        #[cfg(target_os = "linux")]
        if layout.align() == LARGE {
            // Advice: where it is not taken, the memory is as good.
            // SAFETY: the range is that of the allocation, and advice of this kind does not change what it holds.
            unsafe { libc::madvise(memory.cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        // Writing the zeros takes the pages now: what does not fit fails here, not at the first token.
        // SAFETY: the allocation has that many bytes.
        unsafe { memory.write_bytes(0, bytes) };
        Ok(Self { lines, len })
    }

    fn layout(bytes: usize) -> Option<Layout> {
        let align = if bytes >= LARGE { LARGE } else { align_of::<Line>() };
        Layout::from_size_align(bytes, align).ok()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if let (1.., Some(layout)) = (self.len, Self::layout(self.len * size_of::<Line>())) {
            // SAFETY: allocated with this layout.
            unsafe { dealloc(self.lines.as_ptr().cast(), layout) };
        }
    }
}

impl Deref for Pages {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        // SAFETY: that many lines were allocated and written; a line is plain data.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr(), self.len) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_ptr(), self.len) }
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pages({} lines)", self.len)
    }
}
