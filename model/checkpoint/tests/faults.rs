//! Checkpoints on stores that fail: whatever happens while one is written, readers find the old one or the new one,
//! complete.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use proptest::prelude::*;
use ulmus_checkpoint::{
    CheckpointError, FileFault, Manifest, Store, collect_garbage, commit, newest_verified, read_file, verify,
    write_part,
};
use ulmus_types::{
    CheckpointId, CheckpointKind, Digest, ErrorKind, FileEntry, Generation, RunId, StageName, Step,
};

/// What happens to one write.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The store is busy; nothing is written.
    Busy,
    /// The write succeeds, but its answer is lost.
    AnswerLost,
    /// The writer dies after this many bytes, which the store keeps; every later request fails.
    TornThenDead(usize),
    /// The writer dies before the write; every later request fails.
    Dead,
}

/// An object store whose n-th write meets the fault planned for n, if there is one.
#[derive(Debug)]
struct Faulty {
    objects: Arc<InMemory>,
    plan: Mutex<BTreeMap<usize, Fault>>,
    writes: AtomicUsize,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty store")
    }
}

fn busy() -> object_store::Error {
    object_store::Error::Generic { store: "faulty", source: "503 slow down".into() }
}

/// Not retried, so that a test of a dead writer does not wait.
fn dead() -> object_store::Error {
    object_store::Error::NotSupported { source: "the writer is dead".into() }
}

impl Faulty {
    fn store(objects: &Arc<InMemory>, plan: impl IntoIterator<Item = (usize, Fault)>) -> Store {
        let faulty = Self {
            objects: Arc::clone(objects),
            plan: Mutex::new(plan.into_iter().collect()),
            writes: AtomicUsize::new(0),
        };
        Store::from_objects(Arc::new(faulty), Path::from("run"), "faulty")
    }

    fn next_fault(&self) -> Option<Fault> {
        let write = self.writes.fetch_add(1, Ordering::Relaxed);
        let mut plan = self.plan.lock().expect("no test panics while holding it");
        let fault = plan.get(&write).copied();
        if let Some(Fault::TornThenDead(_) | Fault::Dead) = fault {
            plan.insert(write + 1, Fault::Dead);
        }
        fault
    }
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        match self.next_fault() {
            None => self.objects.put_opts(location, payload, options).await,
            Some(Fault::Busy) => Err(busy()),
            Some(Fault::AnswerLost) => {
                self.objects.put_opts(location, payload, options).await?;
                Err(busy())
            }
            Some(Fault::TornThenDead(bytes)) => {
                let whole = payload.into_iter().flatten().collect::<Bytes>();
                let torn = whole.slice(..bytes.min(whole.len()));
                self.objects.put_opts(location, torn.into(), options).await?;
                Err(dead())
            }
            Some(Fault::Dead) => Err(dead()),
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.objects.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.objects.get_opts(location, options).await
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

fn id(step: u64, generation: u64) -> CheckpointId {
    CheckpointId::new(StageName::pretraining(), Step::new(step), Generation::new(generation))
}

fn manifest(id: CheckpointId, kind: CheckpointKind, files: BTreeMap<String, FileEntry>) -> Manifest {
    let plan_digest = Digest::of(b"plan");
    Manifest {
        checkpoint: id,
        kind,
        run: Some(RUN),
        plan_digest,
        state_digest: Digest::of(id.to_string().as_bytes()),
        files,
    }
}

const RUN: RunId = RunId::from_bytes([3; 16]);
/// No step is too late.
const ANY: Step = Step::new(u64::MAX);

const PARTS: [&str; 3] = ["model.safetensors", "optimizer-00000.safetensors", "state.json"];

fn contents(id: CheckpointId, part: &str) -> Bytes {
    format!("{part} of {id} {}", "x".repeat(40)).into()
}

/// The whole protocol, as workers and coordinator run it together.
async fn save(store: &Store, id: CheckpointId, kind: CheckpointKind) -> Result<Manifest, CheckpointError> {
    let mut files = BTreeMap::new();
    for part in PARTS {
        files.insert(part.to_owned(), write_part(store, id, part, contents(id, part)).await?);
    }
    let manifest = manifest(id, kind, files);
    commit(store, &manifest).await?;
    Ok(manifest)
}

fn healthy(objects: &Arc<InMemory>) -> Store {
    Store::from_objects(Arc::clone(objects) as Arc<dyn ObjectStore>, Path::from("run"), "memory")
}

#[tokio::test(start_paused = true)]
async fn busy_stores_and_lost_answers_are_overcome() {
    let objects = Arc::new(InMemory::new());
    let faults = [Fault::Busy, Fault::AnswerLost, Fault::Busy, Fault::Busy, Fault::AnswerLost, Fault::Busy];
    // At least every second write succeeds, so parts, manifest and pointer all meet faults.
    let store = Faulty::store(&objects, faults.into_iter().enumerate().map(|(n, fault)| (n * 2, fault)));
    let saved = save(&store, id(50, 1), CheckpointKind::Milestone).await.unwrap();

    let store = healthy(&objects);
    assert_eq!(verify(&store, id(50, 1), RUN).await.unwrap(), saved);
    assert_eq!(store.get("latest").await.unwrap(), "step-00000050-g1\n");
    assert_eq!(read_file(&store, &saved, PARTS[0]).await.unwrap(), contents(id(50, 1), PARTS[0]));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_stays_busy_is_an_outage_and_not_damage() {
    let objects = Arc::new(InMemory::new());
    let store = Faulty::store(&objects, (0..100).map(|write| (write, Fault::Busy)));
    let error = save(&store, id(50, 1), CheckpointKind::Milestone).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry, "{error}");
}

#[tokio::test]
async fn a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used() {
    let objects = Arc::new(InMemory::new());
    let store = healthy(&objects);
    let old = save(&store, id(50, 1), CheckpointKind::Milestone).await.unwrap();
    let new = save(&store, id(100, 1), CheckpointKind::Milestone).await.unwrap();
    let path = format!("checkpoints/{}/{}", new.checkpoint, PARTS[1]);
    let whole = store.get(&path).await.unwrap();

    let mut flipped = whole.to_vec();
    flipped[3] ^= 1;
    let longer = [&whole[..], b"?"].concat();
    let size = |found: usize| FileFault::Size { expected: whole.len() as u64, found: found as u64 };
    for (damage, expected) in [
        (
            Some(flipped.clone()),
            FileFault::Digest { expected: Digest::of(&whole), found: Digest::of(&flipped) },
        ),
        (Some(whole[..5].to_vec()), size(5)),
        (Some(longer), size(whole.len() + 1)),
        (None, FileFault::Missing),
    ] {
        match damage {
            Some(contents) => store.put(&path, contents).await.unwrap(),
            None => store.delete(&path).await.unwrap(),
        }
        let (found, refused) = newest_verified(&store, RUN, StageName::pretraining(), ANY).await.unwrap();
        assert_eq!(found.as_ref(), Some(&old));
        let [(refused, CheckpointError::File { file, fault, .. })] = &refused[..] else {
            panic!("{refused:?}")
        };
        assert_eq!((*refused, file.as_str(), fault), (new.checkpoint, PARTS[1], &expected));

        let error = read_file(&store, &new, PARTS[1]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("step-00000100-g1: file optimizer-00000"), "{error}");
        store.put(&path, whole.clone()).await.unwrap();
    }
    assert_eq!(newest_verified(&store, RUN, StageName::pretraining(), ANY).await.unwrap().0, Some(new));
}

#[tokio::test]
async fn a_fenced_group_cannot_replace_a_committed_checkpoint() {
    let store = healthy(&Arc::new(InMemory::new()));
    let committed = save(&store, id(50, 1), CheckpointKind::Milestone).await.unwrap();
    commit(&store, &committed).await.unwrap();

    let other = Manifest { state_digest: Digest::of(b"other"), ..committed.clone() };
    let error = commit(&store, &other).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fenced, "{error}");
    assert_eq!(verify(&store, id(50, 1), RUN).await.unwrap(), committed);
}

#[tokio::test]
async fn garbage_goes_and_nothing_else() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path().to_str().unwrap()).unwrap();
    for step in [10, 20, 30, 40] {
        save(&store, id(step, 1), CheckpointKind::Recovery).await.unwrap();
    }
    save(&store, id(15, 1), CheckpointKind::Milestone).await.unwrap();
    for unfinished in [id(16, 1), id(17, 1), id(50, 2)] {
        write_part(&store, unfinished, PARTS[0], "begun").await.unwrap();
    }
    let in_flight = BTreeSet::from([id(17, 1)]);
    let deleted = collect_garbage(&store, StageName::pretraining(), &in_flight).await.unwrap();
    assert_eq!(deleted, [id(10, 1), id(20, 1), id(16, 1)]);
    assert!(collect_garbage(&store, StageName::pretraining(), &in_flight).await.unwrap().is_empty());

    let left = store.list_folders("checkpoints").await.unwrap();
    let names = [id(15, 1), id(17, 1), id(30, 1), id(40, 1), id(50, 2)].map(|id| id.to_string());
    assert_eq!(left, names);
    assert_eq!(
        newest_verified(&store, RUN, StageName::pretraining(), ANY).await.unwrap().0.unwrap().checkpoint,
        id(40, 1)
    );
}

proptest! {
    /// The protocol makes five writes; the writer dies at any of them, with or without a torn file.
    #[test]
    fn a_save_that_dies_leaves_the_old_checkpoint_or_the_new_one(
        dies_at in 0_usize..6,
        torn in prop::option::of(0_usize..400),
        same_step in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let objects = Arc::new(InMemory::new());
            let old = save(&healthy(&objects), id(50, 1), CheckpointKind::Milestone).await.unwrap();
            let new = if same_step { id(50, 2) } else { id(100, 1) };

            let fault = torn.map_or(Fault::Dead, Fault::TornThenDead);
            let saved = save(&Faulty::store(&objects, [(dies_at, fault)]), new, CheckpointKind::Recovery).await;

            let (found, refused) = newest_verified(&healthy(&objects), RUN, StageName::pretraining(), ANY).await.unwrap();
            let found = found.expect("the old checkpoint is never lost");
            if found.checkpoint == new {
                prop_assert!(dies_at >= 3, "parts were missing");
                for part in PARTS {
                    let read = read_file(&healthy(&objects), &found, part).await.unwrap();
                    prop_assert_eq!(read, contents(new, part));
                }
            } else {
                prop_assert_eq!(found, old);
                prop_assert!(saved.is_err(), "a finished save was lost");
                prop_assert!(refused.iter().all(|(id, _)| *id == new));
            }

            // The same group, or the next, finishes the save; only a torn manifest needs a new generation.
            let torn_manifest = torn.is_some() && dies_at == 3;
            let again = if torn_manifest { id(100, 3) } else { new };
            let saved = save(&healthy(&objects), again, CheckpointKind::Recovery).await.unwrap();
            prop_assert_eq!(newest_verified(&healthy(&objects), RUN, StageName::pretraining(), ANY).await.unwrap().0, Some(saved));
            Ok(())
        })?;
    }
}

/// The fake above relies on every write going through `put`.
#[tokio::test]
async fn the_fake_counts_every_write_of_the_protocol() {
    let objects = Arc::new(InMemory::new());
    let store = Faulty::store(&objects, [(5, Fault::Dead)]);
    save(&store, id(50, 1), CheckpointKind::Milestone).await.unwrap();
    assert!(store.put("x", "a sixth write").await.is_err());
    assert!(objects.head(&Path::from("run/latest")).await.is_ok());
}

#[tokio::test]
async fn only_checkpoints_of_the_run_and_up_to_a_step_are_taken() {
    let objects = Arc::new(InMemory::new());
    let store = healthy(&objects);
    let old = save(&store, id(50, 1), CheckpointKind::Milestone).await.unwrap();
    let new = save(&store, id(100, 2), CheckpointKind::Milestone).await.unwrap();
    let newest = async |run, last| {
        newest_verified(&store, run, StageName::pretraining(), Step::new(last)).await.unwrap()
    };
    assert_eq!(newest(RUN, 100).await.0, Some(new));
    let (found, refused) = newest(RUN, 99).await;
    assert!(found == Some(old) && refused.is_empty());
    let other = RunId::from_bytes([4; 16]);
    let (found, refused) = newest(other, 100).await;
    assert_eq!((found, refused.len()), (None, 2));
    let error = refused[0].1.to_string();
    assert!(error.contains("is of run 03030303, and this is run 04040404"), "{error}");
}
