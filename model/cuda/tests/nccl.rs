//! Tests collective operations on devices. Each test starts its members as separate processes, which run the same test,
//! so that one of them can be killed.
//!
//! Several members may share a GPU, which needs NCCL 2.30 or newer. On a machine without a GPU, `.ci/run cuda` runs
//! these tests on the emulator in `model/cuda/emulator`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::thread::park_timeout;
use std::time::{Duration, Instant};

use ulmus_backend::{
    Backend, CommunicatorError, CommunicatorId, Element, Quantum, TrainingBackend as _, View, ViewMut,
};
use ulmus_cuda::{Communicator, Cuda};
use ulmus_types::Partition;

/// Longer than any test takes.
const LONG: Duration = Duration::from_mins(2);
/// What a member prints when it is in the middle of a series of operations.
const READY: &str = "in the middle";

const RANK: &str = "ULMUS_TEST_RANK";
const SIZE: &str = "ULMUS_TEST_SIZE";
const IDS: &str = "ULMUS_TEST_IDS";

/// A member that runs in this process.
struct Member {
    rank: usize,
    size: usize,
    /// The ids of all groups that the test has asked for.
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
    /// The member in this process, or `None` in the process that starts the members.
    fn of_this_process() -> Option<Self> {
        let variable = |name| std::env::var(name).ok();
        let rank: usize = variable(RANK)?.parse().unwrap();
        let cuda = Cuda::new(rank % Cuda::devices()).unwrap();
        let ids = variable(IDS)?.split(',').map(from_hex).collect();
        Some(Self { rank, size: variable(SIZE)?.parse().unwrap(), ids, cuda })
    }

    /// Joins the group of all members.
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

/// Gives up after `time` from now on.
fn within(time: Duration) -> impl Fn() -> Option<String> + Sync {
    let end = Instant::now() + time;
    move || (Instant::now() > end).then(|| format!("{time:?} have passed"))
}

/// Starts this test again, once for each member.
fn start(test: &str, size: usize, groups: usize) -> Vec<Child> {
    start_with(test, size, groups, true)
}

/// Starts this test again, once for each member. With `share`, members may share a GPU.
fn start_with(test: &str, size: usize, groups: usize, share: bool) -> Vec<Child> {
    let device = Cuda::new(0).unwrap();
    let ids: Vec<String> = (0..groups).map(|_| to_hex(device.communicator_id().unwrap())).collect();
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

/// Waits until all members have succeeded.
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
        // A process that found no test of this name would also succeed.
        if !status.success() || !said.contains("1 passed") {
            writeln!(failures, "{status}: {said}").unwrap();
        }
    }
    assert!(failures.is_empty(), "{failures}");
}

/// Random numbers of all magnitudes.
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

/// Random bits, including NaN.
fn floats(len: usize, seed: usize) -> Vec<f32> {
    integers(len, seed).into_iter().map(|x| f32::from_bits(x as u32)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The sum of the members' `vectors`.
fn sum(vectors: impl Iterator<Item = Vec<i64>>) -> Vec<i64> {
    let add =
        |sum: Vec<i64>, one: Vec<i64>| sum.into_iter().zip(one).map(|(a, b)| a.wrapping_add(b)).collect();
    vectors.reduce(add).unwrap()
}

/// Sums over all members what each of them owns.
fn reduce(
    communicator: &mut Communicator,
    data: ViewMut<'_, <Cuda as Backend>::Buffer<i64>>,
    patience: Duration,
) -> Result<(), CommunicatorError> {
    communicator.begin_reduce_scatter(data, &within(patience))?;
    communicator.finish(&within(patience))
}

/// Tests each operation on vectors of several lengths.
fn operations(member: &Member, communicator: &mut Communicator) {
    let (rank, size) = (communicator.rank(), communicator.size());
    for len in [1, 7, 1000, 100_003] {
        let summed = sum((0..size).map(|rank| integers(len, rank)));
        let mut data = member.put(&integers(len, rank));
        reduce(communicator, all(&mut data, len), LONG).unwrap();
        let found = member.get(&data, len);
        for own in Partition::equal(0..len, size).owned(rank) {
            assert_eq!(found[own.clone()], summed[own]);
        }

        // The elements between the parts must not change.
        let parts = [0..len / 3, len / 2..len];
        let of = |rank: usize| floats(len, 100 + rank);
        let mut expected = vec![f32::NAN; len];
        for (rank, part) in (0..size).flat_map(|rank| parts.clone().map(|part| (rank, part))) {
            let [own, rest] = Partition::equal(part, size).owned(rank);
            expected[own.clone()].copy_from_slice(&of(rank)[own]);
            // All members own these elements.
            expected[rest.clone()].copy_from_slice(&of(0)[rest]);
        }
        let mut values = vec![f32::NAN; len];
        for [own, rest] in parts.clone().map(|part| Partition::equal(part, size).owned(rank)) {
            values[own.clone()].copy_from_slice(&of(rank)[own]);
            values[rest.clone()].copy_from_slice(&of(0)[rest]);
        }
        let mut data = member.put(&values);
        communicator.all_gather(all(&mut data, len), &parts, &within(LONG)).unwrap();
        assert_eq!(bits(&member.get(&data, len)), bits(&expected));

        for root in 0..size {
            let mut data = member.put(&floats(len, 200 + rank));
            communicator.broadcast(root, all(&mut data, len), &within(LONG)).unwrap();
            assert_eq!(bits(&member.get(&data, len)), bits(&floats(len, 200 + root)));
        }
    }
    // All parts of a buffer, one of them empty, are begun before any is waited for.
    let mut data = member.put(&integers(100, rank));
    for part in [30..50, 60..60, 70..100] {
        communicator.begin_reduce_scatter(ViewMut::new(&mut data, part), &within(LONG)).unwrap();
    }
    communicator.finish(&within(LONG)).unwrap();
    let found = member.get(&data, 100);
    let summed = sum((0..size).map(|rank| integers(100, rank)));
    for own in [30..50, 70..100].into_iter().flat_map(|part| Partition::equal(part, size).owned(rank)) {
        assert_eq!(found[own.clone()], summed[own]);
    }
    let untouched = integers(100, rank);
    assert_eq!([&found[..30], &found[50..70]], [&untouched[..30], &untouched[50..70]]);
    // The sums are exactly the largest and the smallest number.
    let share = |total: i64| total / size as i64 + if rank == 0 { total % size as i64 } else { 0 };
    let extremes = [i64::MAX, i64::MIN, -1, i64::MIN];
    let mine = [share(i64::MAX), share(i64::MIN), share(-1), if rank == 0 { i64::MIN } else { 0 }];
    let mut data = member.put(&mine);
    reduce(communicator, all(&mut data, 4), LONG).unwrap();
    let found = member.get(&data, 4);
    for own in Partition::equal(0..4, size).owned(rank) {
        assert_eq!(found[own.clone()], extremes[own]);
    }
}

#[test]
#[ignore = "needs GPUs with NCCL, or the emulator: .ci/run cuda"]
fn operations_give_the_expected_results() {
    if let Some(member) = Member::of_this_process() {
        operations(&member, &mut member.join());
        return;
    }
    for size in [2, 4] {
        finish(start("operations_give_the_expected_results", size, 1));
    }
}

/// This works with any supported version of NCCL.
#[test]
#[ignore = "needs GPUs with NCCL, or the emulator: .ci/run cuda"]
fn a_group_of_one_gives_the_expected_results() {
    match Member::of_this_process() {
        Some(member) => operations(&member, &mut member.join()),
        None => finish(start("a_group_of_one_gives_the_expected_results", 1, 1)),
    }
}

/// Gradients become integers, are summed, and become means. An operation comes after kernels that were launched before
/// it, and later ones run concurrently.
#[test]
#[ignore = "needs GPUs with NCCL, or the emulator: .ci/run cuda"]
fn kernels_run_before_and_during_operations() {
    let Some(member) = Member::of_this_process() else {
        return finish(start("kernels_run_before_and_during_operations", 2, 1));
    };
    let mut communicator = member.join();
    let cuda = &member.cuda;
    let (len, parts) = (1 << 18, [1 << 17..1 << 18, 0..1 << 17]);
    let quantum = Quantum::new(1024, 4);
    let gradient = |rank: usize, step: usize| -> Vec<f32> {
        integers(len, 10 * step + rank).iter().map(|x| *x as f32 / i64::MAX as f32 * 1e-3).collect()
    };
    let scale = quantum.mean_scale(1000);
    let mut sums = member.put(&vec![7_i64; len]);
    let mut mean = member.put(&vec![f32::NAN; len]);
    let mut outside = member.put(&[0_u32]);
    for step in 0..5 {
        let own = member.put(&gradient(member.rank, step));
        for part in parts.clone() {
            let gradient = View::new(&own, part.clone());
            cuda.quantise(
                ViewMut::new(&mut sums, part.clone()),
                all(&mut outside, 1),
                gradient,
                &quantum,
                false,
            );
            communicator.begin_reduce_scatter(ViewMut::new(&mut sums, part), &within(LONG)).unwrap();
        }
        communicator.finish(&within(LONG)).unwrap();
        for own in
            parts.iter().flat_map(|part| Partition::equal(part.clone(), member.size).owned(member.rank))
        {
            cuda.dequantise(ViewMut::new(&mut mean, own.clone()), View::new(&sums, own), scale);
        }
        communicator.all_gather(all(&mut mean, len), &parts, &within(LONG)).unwrap();
        let fixed = |rank| gradient(rank, step).iter().map(|x| quantum.quantise(*x).unwrap()).collect();
        let mut expected = vec![0.0; len];
        quantum.mean_into(&sum((0..member.size).map(fixed)), 1000, &mut expected);
        assert_eq!(bits(&member.get(&mean, len)), bits(&expected), "step {step}");
        assert_eq!(member.get(&outside, 1), [0]);
    }
}

#[test]
#[ignore = "needs GPUs with NCCL, or the emulator: .ci/run cuda"]
fn survivors_continue_without_a_killed_member() {
    const VICTIM: usize = 2;
    let name = "survivors_continue_without_a_killed_member";
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
        match reduce(&mut communicator, all(&mut data, len), patience) {
            Ok(()) => rounds += 1,
            Err(error) => break (error, began.elapsed()),
        }
        if rounds == 20 {
            writeln!(std::io::stdout(), "{READY}").unwrap();
        }
    };
    assert!(took < Duration::from_secs(2), "gave up after {took:?}");
    assert!(rounds >= 20, "{rounds} rounds, {error}");
    // With the real NCCL, the connection may also break.
    assert!(
        matches!(error, CommunicatorError::GivenUp { .. } | CommunicatorError::Refused { .. }),
        "{error}"
    );
    assert_eq!(reduce(&mut communicator, all(&mut data, len), patience), Err(error));

    // The survivors use the same device and buffer in a new group.
    let (rank, size) = (member.rank - usize::from(member.rank > VICTIM), member.size - 1);
    let mut communicator =
        Communicator::new(&member.cuda, &member.ids[1], rank, size, &within(LONG)).unwrap();
    member.cuda.upload(all(&mut data, len), &integers(len, rank));
    reduce(&mut communicator, all(&mut data, len), LONG).unwrap();
    let [own, _] = Partition::equal(0..len, size).owned(rank);
    assert_eq!(member.get(&data, len)[own.clone()], sum((0..size).map(|rank| integers(len, rank)))[own]);
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
    assert!(matches!(error, CommunicatorError::GivenUp { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(3), "gave up after {:?}", began.elapsed());
    // The device is still usable.
    let id = &member.ids[1];
    let mut communicator =
        Communicator::new(&member.cuda, id, member.rank, member.size, &within(LONG)).unwrap();
    operations(&member, &mut communicator);
}

/// The others are not notified of a member that leaves, just as of one that dies.
#[test]
#[ignore = "needs GPUs with NCCL, or the emulator: .ci/run cuda"]
fn an_operation_that_not_all_members_call_is_given_up() {
    let Some(member) = Member::of_this_process() else {
        return finish(start("an_operation_that_not_all_members_call_is_given_up", 2, 3));
    };
    let len = 1 << 20;
    let mut data = member.put(&integers(len, member.rank));
    let mut communicator = member.join();
    reduce(&mut communicator, all(&mut data, len), LONG).unwrap();
    if member.rank == 0 {
        communicator.begin_reduce_scatter(all(&mut data, len), &within(LONG)).unwrap();
        // The operation never completes, but kernels and copies do not wait for it.
        let other = member.put(&integers(100, 1));
        assert_eq!(member.get(&other, 100), integers(100, 1));
        let error = communicator.finish(&|| Some("told to".to_owned())).unwrap_err();
        assert!(
            matches!(&error, CommunicatorError::GivenUp { reason, .. } if reason == "told to"),
            "{error}"
        );
        // Another operation is begun, and is given up when its communicator is dropped.
        let id = &member.ids[1];
        let mut communicator = Communicator::new(&member.cuda, id, 0, member.size, &within(LONG)).unwrap();
        communicator.begin_reduce_scatter(all(&mut data, len), &within(LONG)).unwrap();
    } else {
        drop(communicator);
        let id = &member.ids[1];
        drop(Communicator::new(&member.cuda, id, 1, member.size, &within(LONG)).unwrap());
    }
    let mut communicator =
        Communicator::new(&member.cuda, &member.ids[2], member.rank, member.size, &within(LONG)).unwrap();
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
    assert!(matches!(&error, CommunicatorError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("invalid usage"), "{error}");
}
