//! The messages of a stream, as bytes for Arrow's decoder, which makes room for as much as they say that they have. So their
//! lengths are compared with what is there, and after the last message there is nothing but padding: damage takes no memory,
//! and ends no stream early in silence.

use std::io::{self, BufRead, Cursor, Read, Take};

use arrow_ipc::{Buffer, RecordBatch, root_as_message};

use crate::compressed::skip_zeros;
use crate::error::DataError;

/// What stands before the length of a message, except in old files.
const CONTINUATION: [u8; 4] = [0xff; 4];

/// The bytes of a stream, message by message.
pub(super) struct Messages<R> {
    stored: Take<R>,
    place: String,
    /// A message up to its body: its length and its description.
    head: Cursor<Vec<u8>>,
    /// Bytes of its body that were not yet given.
    body: u64,
}

impl<R: BufRead> Messages<R> {
    /// The messages of a stream, which is all of `stored`.
    pub(super) fn new(stored: Take<R>, place: String) -> Self {
        Self { stored, place, head: Cursor::default(), body: 0 }
    }

    /// Reads the next message up to its body; at the end of the stream, nothing.
    fn begin(&mut self) -> io::Result<()> {
        let mut head = self.bytes(4)?;
        if head == CONTINUATION {
            head.extend(self.bytes(4)?);
        }
        let Some(length) = head.last_chunk().filter(|_| head.len().is_multiple_of(4)) else {
            return if head.is_empty() { Ok(()) } else { Err(wrong("it ends within a message")) };
        };
        let length = self.checked(i32::from_le_bytes(*length).into(), "a description")?;
        if length == 0 {
            if skip_zeros(&mut self.stored)? {
                return Err(wrong("there is something behind its end"));
            }
        } else {
            let description = self.bytes(length)?;
            let message = root_as_message(&description).map_err(|_| wrong("a description is damaged"))?;
            self.body = self.checked(message.bodyLength(), "a body")?;
            let of_dictionary = || message.header_as_dictionary_batch()?.data();
            if let Some(batch) = message.header_as_record_batch().or_else(of_dictionary) {
                self.check_buffers(batch)?;
            }
            head.extend(description);
        }
        self.head = Cursor::new(head);
        Ok(())
    }

    /// The next so many bytes, or those that are left.
    fn bytes(&mut self, count: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        (&mut self.stored).take(count).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// A length, if there are so many bytes.
    fn checked(&self, length: i64, what: &str) -> io::Result<u64> {
        let left = self.stored.limit();
        let there = u64::try_from(length).ok().filter(|length| *length <= left);
        there.ok_or_else(|| wrong(format!("{what} of {length} bytes begins where {left} are left")))
    }

    /// Checks that the buffers of a batch lie in its body, and are not compressed.
    fn check_buffers(&self, batch: RecordBatch<'_>) -> io::Result<()> {
        if let Some(compression) = batch.compression() {
            return Err(io::Error::other(DataError::CompressedArrow {
                file: self.place.clone(),
                codec: compression.codec().variant_name().unwrap_or("an unknown codec"),
            }));
        }
        let end = |buffer: &Buffer| {
            let [offset, length] =
                [buffer.offset(), buffer.length()].map(|number| u64::try_from(number).ok());
            offset?.checked_add(length?)
        };
        let mut buffers = batch.buffers().into_iter().flatten();
        match buffers.find(|buffer| end(buffer).is_none_or(|end| end > self.body)) {
            None => Ok(()),
            Some(buffer) => Err(wrong(format!(
                "a buffer of {} bytes at {} is not in a body of {}",
                buffer.length(),
                buffer.offset(),
                self.body
            ))),
        }
    }
}

fn wrong(reason: impl Into<String>) -> io::Error {
    io::Error::other(reason.into())
}

impl<R: BufRead> Read for Messages<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let is_given = |head: &Cursor<Vec<u8>>| head.position() == head.get_ref().len() as u64;
        if is_given(&self.head) && self.body == 0 {
            self.begin()?;
        }
        if !is_given(&self.head) {
            return self.head.read(buffer);
        }
        let read = (&mut self.stored).take(self.body).read(buffer)?;
        self.body -= read as u64;
        Ok(read)
    }
}
