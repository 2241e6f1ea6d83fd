//! Collective operations on devices, between processes: each test starts its members as processes of their own, which
//! run the same test, so that one of them can be killed.
//!
//! Several members may have one GPU, which needs NCCL 2.30 or newer. On a machine without a GPU, `.ci/run cuda` runs
//! this on the emulator of `model/emulator`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::thread::park_timeout;
use std::time::{Duration, Instant};

use ulmus_model::{Backend, Communicator, CommunicatorId, Cuda, Element, NcclError, Quantum, View, ViewMut};

/// No test takes so long.
const LONG: Duration = Duration::from_mins(2);
/// What a member says when it is in the middle of a series of operations.
const READY: &str = "in the middle";

const RANK: &str = "ULMUS_TEST_RANK";
const SIZE: &str = "ULMUS_TEST_SIZE";
const IDS: &str = "ULMUS_TEST_IDS";

/// The process of a member.
struct Member {
    rank: usize,
    size: usize,
    /// Of as many groups as the test asked for.
    ids: Vec<CommunicatorId>,
    cuda: Cuda,
}

fn from_hex(text: &str) -> CommunicatorId {
    let byte = |at: usize| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap();
    CommunicatorId::from_bytes(std::array::from_fn(byte))
}

fn to_hex(id: CommunicatorId) -> String {
    id.to_bytes().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

impl Member {
    /// Nothing in the process that starts the others.
    fn of_this_process() -> Option<Self> {
        let variable = |name| std::env::var(name).ok();
        let rank: usize = variable(RANK)?.parse().unwrap();
        let cuda = Cuda::new(rank % Cuda::devices()).unwrap();
        let ids = variable(IDS)?.split(',').map(from_hex).collect();
        Some(Self { rank, size: variable(SIZE)?.parse().unwrap(), ids, cuda })
    }

    /// Of the group in which all take part.
    fn join(&self) -> Communicator {
        Communicator::new(&self.cuda, &self.ids[0], self.rank, self.size, &within(LONG)).unwrap()
    }

    fn put<T: Element>(&self, values: &[T]) -> <Cuda as Backend>::Buffer<T> {
        let mut buffer = self.cuda.allocate(values.len()).unwrap();
        self.cuda.upload(all(&mut buffer, values.len()), values);
        buffer
    }

    fn get<T: Element>(&self, buffer: &<Cuda as Backend>::Buffer<T>, len: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); len];
        self.cuda.download(View::new(buffer, 0..len), &mut values);
        values
    }
}

fn all<T>(buffer: &mut T, len: usize) -> ViewMut<'_, T> {
    ViewMut::new(buffer, 0..len)
}

/// Patience that ends some time from now.
fn within(time: Duration) -> impl Fn() -> Option<String> + Sync {
    let end = Instant::now() + time;
    move || (Instant::now() > end).then(|| format!("{time:?} have passed"))
}

/// Starts this test again, once for each member.
fn start(test: &str, size: usize, groups: usize) -> Vec<Child> {
    start_with(test, size, groups, true)
}

/// The same, and says whether members may have one GPU.
fn start_with(test: &str, size: usize, groups: usize, share: bool) -> Vec<Child> {
    let ids: Vec<String> = (0..groups).map(|_| to_hex(CommunicatorId::new().unwrap())).collect();
    let member = |rank: usize| {
        Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--ignored", "--nocapture"])
            .env(RANK, rank.to_string())
            .env(SIZE, size.to_string())
            .env(IDS, ids.join(","))
            .env("NCCL_MULTI_RANK_GPU_ENABLE", u8::from(share).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    (0..size).map(member).collect()
}

/// Waits until all are done, with success.
fn finish(members: Vec<Child>) {
    let end = Instant::now() + LONG;
    let mut failures = String::new();
    for mut member in members {
        while member.try_wait().unwrap().is_none() {
            if Instant::now() > end {
                member.kill().unwrap();
            }
            park_timeout(Duration::from_millis(5));
        }
        let status = member.wait().unwrap();
        let mut said = String::new();
        member.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        member.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        // A name that is no test's is a success as well.
        if !status.success() || !said.contains("1 passed") {
            writeln!(failures, "{status}: {said}").unwrap();
        }
    }
    assert!(failures.is_empty(), "{failures}");
}

/// Numbers of all magnitudes, the same for the same seed.
fn integers(len: usize, seed: usize) -> Vec<i64> {
    let mut state = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as i64 >> (state % 63)
    };
    (0..len).map(|_| next()).collect()
}

/// Any bits at all, NaNs among them.
fn floats(len: usize, seed: usize) -> Vec<f32> {
    integers(len, seed).into_iter().map(|x| f32::from_bits(x as u32)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// What members with `vectors` make of them together.
fn sum(vectors: impl Iterator<Item = Vec<i64>>) -> Vec<i64> {
    let add =
        |sum: Vec<i64>, one: Vec<i64>| sum.into_iter().zip(one).map(|(a, b)| a.wrapping_add(b)).collect();
    vectors.reduce(add).unwrap()
}

/// Chunks of different lengths, one of which is empty if there are three or more.
fn uneven(len: usize, size: usize) -> Vec<Range<usize>> {
    let weights = &[3, 1, 0, 5][..size];
    let cut = |rank: usize| len * weights[..rank].iter().sum::<usize>() / weights.iter().sum::<usize>();
    (0..size).map(|rank| cut(rank)..cut(rank + 1)).collect()
}

/// Each operation on vectors of several lengths, and what it has to give.
fn operations(member: &Member, communicator: &mut Communicator) {
    let (rank, size) = (communicator.rank(), communicator.size());
    for len in [1, 7, 1000, 100_003] {
        let chunks = uneven(len, size);
        let summed = sum((0..size).map(|rank| integers(len, rank)));

        let mut data = member.put(&integers(len, rank));
        communicator.all_reduce_i64(all(&mut data, len), &within(LONG)).unwrap();
        assert_eq!(member.get(&data, len), summed);

        let mut data = member.put(&integers(len, rank));
        communicator.reduce_scatter_i64(all(&mut data, len), &chunks, &within(LONG)).unwrap();
        let own = chunks[rank].clone();
        assert_eq!(member.get(&data, len)[own.clone()], summed[own]);

        let mut values = vec![f32::NAN; len];
        values[chunks[rank].clone()].copy_from_slice(&floats(len, 100 + rank)[chunks[rank].clone()]);
        let mut data = member.put(&values);
        communicator.all_gather_f32(all(&mut data, len), &chunks, &within(LONG)).unwrap();
        let expected: Vec<f32> = chunks
            .iter()
            .enumerate()
            .flat_map(|(rank, chunk)| floats(len, 100 + rank)[chunk.clone()].to_vec())
            .collect();
        assert_eq!(bits(&member.get(&data, len)), bits(&expected));

        for root in 0..size {
            let mut data = member.put(&floats(len, 200 + rank));
            communicator.broadcast_f32(root, all(&mut data, len), &within(LONG)).unwrap();
            assert_eq!(bits(&member.get(&data, len)), bits(&floats(len, 200 + root)));
        }
    }
    // A part of a buffer, and nothing at all.
    let mut data = member.put(&integers(100, rank));
    communicator.all_reduce_i64(ViewMut::new(&mut data, 30..50), &within(LONG)).unwrap();
    communicator.all_reduce_i64(ViewMut::new(&mut data, 60..60), &within(LONG)).unwrap();
    let mut expected = integers(100, rank);
    expected[30..50].copy_from_slice(&sum((0..size).map(|rank| integers(100, rank)))[30..50]);
    assert_eq!(member.get(&data, 100), expected);
    // The largest and the smallest number, exactly.
    let share = |total: i64| total / size as i64 + if rank == 0 { total % size as i64 } else { 0 };
    let mut data =
        member.put(&[share(i64::MAX), share(i64::MIN), share(-1), if rank == 0 { i64::MIN } else { 0 }]);
    communicator.all_reduce_i64(all(&mut data, 4), &within(LONG)).unwrap();
    assert_eq!(member.get(&data, 4), [i64::MAX, i64::MIN, -1, i64::MIN]);
}

#[test]
#[ignore = "needs GPUs with NCCL, or the emulator: .ci/run cuda"]
fn operations_give_what_they_should() {
    if let Some(member) = Member::of_this_process() {
        operations(&member, &mut member.join());
        return;
    }
    for size in [1, 2, 4] {
        finish(start("operations_give_what_they_should", size, 1));
    }
}

/// Gradients become integers, are summed, and become means: kernels, an operation and kernels on one stream, with
/// nothing between them that waits for the device.
#[test]
#[ignore = "needs GPUs with NCCL, or the emulator: .ci/run cuda"]
fn kernels_come_before_and_after() {
    let Some(member) = Member::of_this_process() else {
        return finish(start("kernels_come_before_and_after", 2, 1));
    };
    let mut communicator = member.join();
    let len = 1 << 18;
    let quantum = Quantum::new(1024, 4);
    let gradient = |rank: usize, step: usize| -> Vec<f32> {
        integers(len, 10 * step + rank).iter().map(|x| *x as f32 / i64::MAX as f32 * 1e-3).collect()
    };
    let scale = quantum.mean_scale(1000);
    let mut sums = member.put(&vec![0_i64; len]);
    let mut mean = member.put(&vec![f32::NAN; len]);
    for step in 0..5 {
        let own = member.put(&gradient(member.rank, step));
        member.cuda.upload(all(&mut sums, len), &vec![0; len]);
        assert!(member.cuda.quantise_add(all(&mut sums, len), View::new(&own, 0..len), &quantum));
        communicator.all_reduce_i64(all(&mut sums, len), &within(LONG)).unwrap();
        member.cuda.dequantise(all(&mut mean, len), View::new(&sums, 0..len), scale);
        communicator.broadcast_f32(1, all(&mut mean, len), &within(LONG)).unwrap();
        let fixed = |rank| gradient(rank, step).iter().map(|x| quantum.quantise(*x).unwrap()).collect();
        let mut expected = vec![0.0; len];
        quantum.mean_into(&sum((0..member.size).map(fixed)), 1000, &mut expected);
        assert_eq!(bits(&member.get(&mean, len)), bits(&expected), "step {step}");
    }
}

#[test]
#[ignore = "needs GPUs with NCCL, or the emulator: .ci/run cuda"]
fn survivors_of_a_killed_member_go_on_without_it() {
    const VICTIM: usize = 2;
    let name = "survivors_of_a_killed_member_go_on_without_it";
    let Some(member) = Member::of_this_process() else {
        let mut members = start(name, 4, 2);
        let mut victim = members.remove(VICTIM);
        let said = BufReader::new(victim.stdout.take().unwrap());
        assert!(said.lines().any(|line| line.unwrap().contains(READY)), "the victim did not come so far");
        park_timeout(Duration::from_millis(20));
        victim.kill().unwrap();
        victim.wait().unwrap();
        return finish(members);
    };
    let len = 50_000;
    let mut communicator = member.join();
    let mut data = member.put(&integers(len, member.rank));
    let patience = Duration::from_secs(1);
    let mut rounds = 0;
    let (error, took) = loop {
        let began = Instant::now();
        match communicator.all_reduce_i64(all(&mut data, len), &within(patience)) {
            Ok(()) => rounds += 1,
            Err(error) => break (error, began.elapsed()),
        }
        if rounds == 20 {
            writeln!(std::io::stdout(), "{READY}").unwrap();
        }
    };
    assert!(took < Duration::from_secs(2), "gave up after {took:?}");
    assert!(rounds >= 20, "{rounds} rounds, {error}");
    // With NCCL itself, the connection may break as well.
    assert!(matches!(error, NcclError::GivenUp { .. } | NcclError::Refused { .. }), "{error}");
    assert_eq!(communicator.all_reduce_i64(all(&mut data, len), &within(patience)), Err(error));

    // The same device and buffer.
    let (rank, size) = (member.rank - usize::from(member.rank > VICTIM), member.size - 1);
    let mut communicator =
        Communicator::new(&member.cuda, &member.ids[1], rank, size, &within(LONG)).unwrap();
    member.cuda.upload(all(&mut data, len), &integers(len, rank));
    communicator.all_reduce_i64(all(&mut data, len), &within(LONG)).unwrap();
    assert_eq!(member.get(&data, len), sum((0..size).map(|rank| integers(len, rank))));
    operations(&member, &mut communicator);
}

#[test]
#[ignore = "needs GPUs with NCCL, or the emulator: .ci/run cuda"]
fn a_group_that_lacks_a_member_is_given_up() {
    let Some(member) = Member::of_this_process() else {
        return finish(start("a_group_that_lacks_a_member_is_given_up", 2, 2));
    };
    let began = Instant::now();
    let patience = within(Duration::from_millis(300));
    let error = Communicator::new(&member.cuda, &member.ids[0], member.rank, 3, &patience).unwrap_err();
    assert!(matches!(error, NcclError::GivenUp { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(3), "gave up after {:?}", began.elapsed());
    // That does no harm to the device.
    let id = &member.ids[1];
    let mut communicator =
        Communicator::new(&member.cuda, id, member.rank, member.size, &within(LONG)).unwrap();
    operations(&member, &mut communicator);
}

/// A member that leaves is as one that dies: the others hear nothing.
#[test]
#[ignore = "needs GPUs with NCCL, or the emulator: .ci/run cuda"]
fn an_operation_that_not_all_call_is_given_up() {
    let Some(member) = Member::of_this_process() else {
        return finish(start("an_operation_that_not_all_call_is_given_up", 2, 2));
    };
    let len = 1 << 20;
    let mut data = member.put(&integers(len, member.rank));
    let mut communicator = member.join();
    communicator.all_reduce_i64(all(&mut data, len), &within(LONG)).unwrap();
    if member.rank == 0 {
        let error =
            communicator.all_reduce_i64(all(&mut data, len), &|| Some("told to".to_owned())).unwrap_err();
        assert!(matches!(&error, NcclError::GivenUp { reason, .. } if reason == "told to"), "{error}");
    } else {
        drop(communicator);
    }
    let mut communicator =
        Communicator::new(&member.cuda, &member.ids[1], member.rank, member.size, &within(LONG)).unwrap();
    operations(&member, &mut communicator);
}

#[test]
#[ignore = "needs GPUs with NCCL, or the emulator: .ci/run cuda"]
fn a_gpu_that_may_not_be_shared_is_refused() {
    let Some(member) = Member::of_this_process() else {
        return finish(start_with("a_gpu_that_may_not_be_shared_is_refused", 2, 1, false));
    };
    let cuda = Cuda::new(0).unwrap();
    let error =
        Communicator::new(&cuda, &member.ids[0], member.rank, member.size, &within(LONG)).unwrap_err();
    assert!(matches!(&error, NcclError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("invalid usage"), "{error}");
}
