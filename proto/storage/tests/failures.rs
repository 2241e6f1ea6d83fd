//! The client on stores that fail: what passes is overcome, what does not is told at once, and an upload whose end is in
//! doubt is compared with what is there.

#![expect(clippy::unwrap_used, reason = "a test stops at what it does not expect")]

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};
use tokio::time::Instant;
use ulmus_storage::{RateLimiter, Retries, Store, StoreError};
use ulmus_types::ErrorKind;

/// More than one piece.
const LARGE: usize = (16 << 20) + 5;

fn filled(byte: u8) -> Vec<u8> {
    vec![byte; LARGE]
}

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// It works.
    None,
    /// The store is busy, and nothing is done.
    Busy,
    /// The work is done, and the store is busy when it should answer.
    AnswerLost,
    /// The work is done and the answer lost; asked again, the store knows of no such upload.
    EndLost,
    /// The store knows of no such upload, and has done nothing.
    Forgotten,
    /// The store does not do such things.
    Refused,
}

fn busy() -> Error {
    Error::Generic { store: "faulty", source: "503 slow down".into() }
}

fn refused() -> Error {
    Error::NotSupported { source: "no".into() }
}

fn unknown() -> Error {
    Error::NotFound { path: "upload".to_owned(), source: "no such upload".into() }
}

/// Faults of the next requests, of each kind; those behind them work.
#[derive(Debug, Default)]
struct Plan {
    puts: VecDeque<Fault>,
    reads: VecDeque<Fault>,
    parts: VecDeque<Fault>,
    ends: VecDeque<Fault>,
    /// What becomes of the file when the next range is read.
    replaced: Option<(Path, PutPayload)>,
    uploads: usize,
    aborted: usize,
}

type Shared = Arc<Mutex<Plan>>;

fn next(shared: &Shared, faults: impl Fn(&mut Plan) -> &mut VecDeque<Fault>) -> Fault {
    faults(&mut shared.lock().unwrap()).pop_front().unwrap_or(Fault::None)
}

#[derive(Debug)]
struct Faulty {
    objects: InMemory,
    plan: Shared,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

fn faulty(plan: Plan) -> (Store, Shared) {
    let plan = Arc::new(Mutex::new(plan));
    let objects = Faulty { objects: InMemory::new(), plan: Arc::clone(&plan) };
    (Store::from_objects(Arc::new(objects), Path::default(), "s3://bucket"), plan)
}

#[derive(Debug)]
struct Upload {
    inner: Box<dyn MultipartUpload>,
    plan: Shared,
    is_gone: bool,
}

#[async_trait::async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        match next(&self.plan, |plan| &mut plan.parts) {
            Fault::None => self.inner.put_part(data),
            _ => Box::pin(async { Err(busy()) }),
        }
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let fault = next(&self.plan, |plan| &mut plan.ends);
        self.is_gone = matches!(fault, Fault::EndLost | Fault::Forgotten | Fault::AnswerLost);
        match fault {
            Fault::None => self.inner.complete().await,
            Fault::EndLost => self.inner.complete().await.and(Err(unknown())),
            // The library aborts an upload whose end failed.
            Fault::AnswerLost => self.inner.complete().await.and(Err(busy())),
            Fault::Forgotten => Err(unknown()),
            Fault::Busy => Err(busy()),
            Fault::Refused => Err(refused()),
        }
    }

    async fn abort(&mut self) -> Result<()> {
        self.plan.lock().unwrap().aborted += 1;
        if self.is_gone { Err(unknown()) } else { self.inner.abort().await }
    }
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        match next(&self.plan, |plan| &mut plan.puts) {
            Fault::None => self.objects.put_opts(location, payload, options).await,
            Fault::AnswerLost => self.objects.put_opts(location, payload, options).await.and(Err(busy())),
            Fault::Refused => Err(refused()),
            _ => Err(busy()),
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.plan.lock().unwrap().uploads += 1;
        let upload = self.objects.put_multipart_opts(location, options).await?;
        Ok(Box::new(Upload { inner: upload, plan: Arc::clone(&self.plan), is_gone: false }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let replaced = if options.range.is_some() { self.plan.lock().unwrap().replaced.take() } else { None };
        if let Some((path, contents)) = replaced {
            self.objects.put_opts(&path, contents, PutOptions::default()).await?;
        }
        match next(&self.plan, |plan| &mut plan.reads) {
            Fault::None => self.objects.get_opts(location, options).await,
            Fault::Refused => Err(refused()),
            _ => Err(busy()),
        }
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.objects.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.objects.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.objects.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.objects.copy_opts(from, to, options).await
    }
}

#[tokio::test(start_paused = true)]
async fn what_passes_is_overcome() {
    let puts = [Fault::Busy, Fault::AnswerLost, Fault::Busy].into();
    let (store, plan) = faulty(Plan { puts, ..Plan::default() });
    store.put("a", "one").await.unwrap();
    plan.lock().unwrap().reads = [Fault::Busy; 4].into();
    assert_eq!(store.get("a").await.unwrap(), "one");
}

/// Who has lost the answer cannot tell whether the file that is there is its own, and compares.
#[tokio::test(start_paused = true)]
async fn a_new_file_whose_answer_was_lost_is_there() {
    let (store, _) = faulty(Plan { puts: [Fault::AnswerLost].into(), ..Plan::default() });
    assert!(!store.put_new("a", "mine").await.unwrap());
    assert_eq!(store.get("a").await.unwrap(), "mine");
}

#[tokio::test(start_paused = true)]
async fn an_outage_ends_in_a_deadline() {
    let (store, plan) = faulty(Plan { puts: [Fault::Busy; 100].into(), ..Plan::default() });
    let begun = Instant::now();
    let error = store.put("a", "one").await.unwrap_err();
    assert!(matches!(error, StoreError::Deadline { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Retry);
    let message = error.to_string();
    assert!(message.starts_with("cannot write s3://bucket/a after trying for "), "{message}");
    assert!(message.contains("503 slow down"), "{message}");
    assert_eq!(begun.elapsed(), Retries::RUN.deadline);
    // An upload in parts says so, too; each of its attempts is a new one.
    plan.lock().unwrap().parts = [Fault::Busy; 100].into();
    let begun = Instant::now();
    let error = store.put("b", filled(1)).await.unwrap_err();
    assert!(matches!(error, StoreError::Deadline { act: "write", .. }), "{error}");
    assert_eq!(begun.elapsed(), Retries::RUN.deadline);
    plan.lock().unwrap().reads = [Fault::Busy; 100].into();
    let error = store.get("a").await.unwrap_err();
    assert!(matches!(error, StoreError::Deadline { act: "read", .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn what_is_final_is_told_at_once() {
    let (store, _) = faulty(Plan { puts: [Fault::Refused; 2].into(), ..Plan::default() });
    let begun = Instant::now();
    let error = store.put("a", "one").await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    assert_eq!((error.kind(), begun.elapsed()), (ErrorKind::InvalidInput, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_breaks_off_is_aborted_and_begun_again() {
    let (store, plan) = faulty(Plan {
        parts: [Fault::None, Fault::Busy].into(),
        ends: [Fault::Busy].into(),
        ..Plan::default()
    });
    store.put("a", filled(1)).await.unwrap();
    {
        let plan = plan.lock().unwrap();
        assert_eq!((plan.uploads, plan.aborted), (3, 2));
    }
    assert!(store.get("a").await.unwrap() == filled(1));
}

/// Lost after the work was done: with it the upload is over.
#[tokio::test(start_paused = true)]
async fn an_upload_whose_end_was_lost_is_written() {
    for fault in [Fault::EndLost, Fault::AnswerLost] {
        let (store, plan) = faulty(Plan { ends: [fault].into(), ..Plan::default() });
        store.put("a", filled(1)).await.unwrap();
        assert_eq!(plan.lock().unwrap().uploads, 1, "{fault:?}");
        assert!(store.get("a").await.unwrap() == filled(1));
    }
}

/// A file of the same length that was there before is not taken for what was sent.
#[tokio::test(start_paused = true)]
async fn an_upload_that_its_store_forgot_is_begun_again() {
    let (store, plan) = faulty(Plan::default());
    for earlier in [None, Some(filled(1))] {
        if let Some(earlier) = earlier {
            store.put("a", earlier).await.unwrap();
        }
        let before = plan.lock().unwrap().uploads;
        plan.lock().unwrap().ends = [Fault::Forgotten, Fault::Forgotten].into();
        store.put("a", filled(2)).await.unwrap();
        assert_eq!(plan.lock().unwrap().uploads - before, 3);
        assert!(store.get("a").await.unwrap() == filled(2));
        store.delete("a").await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_begun_again_and_read_back() {
    let (from, reads) = faulty(Plan::default());
    let (to, ends) = faulty(Plan::default());
    from.put("a", filled(3)).await.unwrap();
    let file = from.stat("a").await.unwrap();
    reads.lock().unwrap().reads = [Fault::Busy; 3].into();
    ends.lock().unwrap().ends = [Fault::Forgotten, Fault::Busy, Fault::EndLost].into();
    from.copy(&file, &to, &RateLimiter::new(None), |_| ()).await.unwrap();
    assert!(to.get("a").await.unwrap() == filled(3));
    assert_eq!(ends.lock().unwrap().uploads, 3);

    // While it is read back, somebody writes something else there.
    ends.lock().unwrap().replaced = Some((Path::from("a"), filled(4).into()));
    let error = from.copy(&file, &to, &RateLimiter::new(None), |_| ()).await.unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, StoreError::Damaged { .. }), "{message}");
    assert!(message.contains("it is another than s3://bucket/a, of which it is a copy"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_replaced_while_it_is_read_is_read_anew() {
    let (store, plan) = faulty(Plan::default());
    store.put("a", filled(1)).await.unwrap();
    plan.lock().unwrap().replaced = Some((Path::from("a"), filled(2).into()));
    assert!(store.get("a").await.unwrap() == filled(2));
}
