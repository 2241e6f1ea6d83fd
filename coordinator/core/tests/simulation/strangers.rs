//! Messages from senders that do not take part in the run, or that lie.

use proptest::prelude::*;
use ulmus_types::{
    BadUnit, Blame, CheckpointId, CheckpointKind, Digest, ErrorKind, FileEntry, Generation, Heartbeat, Job,
    LeaveReason, Rank, Ready, Snapshot, SourceReading, StageName, Step, StepReport, Subject, ToCoordinator,
};

use crate::FILES;
use crate::worker::State;

/// Arbitrary messages, with numbers in and around the possible range.
pub(crate) fn anything() -> impl Strategy<Value = ToCoordinator> {
    let number = || prop_oneof![0_u64..20, Just(u64::MAX), Just(1 << 63)];
    let step = move || number().prop_map(Step::new);
    let generation = move || prop_oneof![0_u64..6, Just(u64::MAX)].prop_map(Generation::new);
    let text = || {
        prop_oneof![Just(String::new()), Just("\u{1b}[2J".to_owned()), Just("web".to_owned()), "[a-c./]{0,9}"]
    };
    let real = || prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(-1.0), Just(2.5)];
    let checkpoint = move || {
        (step(), generation())
            .prop_map(|(step, generation)| CheckpointId::new(StageName::pretraining(), step, generation))
    };
    let reports = move || {
        prop::collection::vec((step(), number(), real()), 0..3).prop_map(|reports| {
            let of = |(step, tokens, loss)| StepReport {
                step,
                tokens,
                loss,
                ..State::after(StageName::pretraining(), 1).report()
            };
            reports.into_iter().map(of).collect::<Vec<_>>()
        })
    };
    let snapshot = move || {
        (checkpoint(), any::<bool>(), prop::collection::vec(text(), 0..4)).prop_map(
            |(checkpoint, milestone, files)| {
                let kind = if milestone { CheckpointKind::Milestone } else { CheckpointKind::Recovery };
                let files = if files.len() == 3 { FILES.map(str::to_owned).to_vec() } else { files };
                Snapshot { checkpoint, kind, state: Digest::of(b"invented"), files }
            },
        )
    };
    let job = move || {
        prop_oneof![
            Just(crate::job("prepare")),
            Just(crate::job("export")),
            Just(crate::job("benchmark")),
            Just(crate::job("invented")),
            checkpoint().prop_map(|id| Job::new("average".parse().unwrap(), Subject::Stage(vec![id]))),
            checkpoint().prop_map(|id| Job::new("average".parse().unwrap(), Subject::Milestone(id))),
        ]
    };
    let reason = move || {
        prop_oneof![
            Just(LeaveReason::Agreed),
            Just(LeaveReason::Finished),
            text().prop_map(LeaveReason::Exhausted),
            (text(), number(), text())
                .prop_map(|(source, unit, why)| LeaveReason::BadUnit(BadUnit { source, unit }, why)),
            (0_u32..9, text()).prop_map(|(rank, message)| LeaveReason::Lost {
                suspect: Some((Rank::new(rank), Blame::Unreachable)),
                message
            }),
            text().prop_map(|message| LeaveReason::Failed { kind: ErrorKind::Corrupt, message }),
        ]
    };
    let entry = FileEntry { bytes: u64::MAX, digest: Digest::of(b"invented") };
    prop_oneof![
        text().prop_map(|nonce| ToCoordinator::StoreRead(Ok(Digest::of(nonce.as_bytes())))),
        text().prop_map(|error| ToCoordinator::StoreRead(Err(error))),
        (prop::option::of(generation()), reports(), prop::collection::vec(snapshot(), 0..2)).prop_map(
            |(generation, reports, snapshots)| ToCoordinator::Ready(Ready {
                fingerprint: Some(Digest::of(b"other arithmetic")),
                generation,
                reports,
                snapshots,
            })
        ),
        text().prop_map(|message| ToCoordinator::Unfit { kind: ErrorKind::Internal, message }),
        Just(ToCoordinator::Draining),
        (generation(), number()).prop_map(|(generation, collective)| {
            ToCoordinator::Heartbeat(Heartbeat { generation, collective, ..Heartbeat::default() })
        }),
        generation().prop_map(ToCoordinator::Connected),
        (generation(), step()).prop_map(|(generation, step)| ToCoordinator::Formed { generation, step }),
        (generation(), reports())
            .prop_map(|(generation, reports)| ToCoordinator::Steps { generation, reports }),
        (step(), text(), real()).prop_map(|(step, source, epochs)| {
            let reading = SourceReading { source, epochs, ..SourceReading::default() };
            ToCoordinator::Reading { step, sources: vec![reading] }
        }),
        (generation(), step(), reason()).prop_map(|(generation, step, reason)| ToCoordinator::Left {
            generation,
            step,
            reason
        }),
        snapshot().prop_map(ToCoordinator::Snapshot),
        (checkpoint(), text()).prop_map(move |(checkpoint, name)| {
            ToCoordinator::Written { checkpoint, files: [(name, entry)].into() }
        }),
        (checkpoint(), text()).prop_map(|(checkpoint, message)| {
            ToCoordinator::WriteFailed { checkpoint, kind: ErrorKind::Internal, message }
        }),
        text().prop_map(ToCoordinator::Notice),
        (job(), text()).prop_map(|(job, result)| ToCoordinator::JobDone { job, result }),
        (job(), text(), prop::option::of(checkpoint())).prop_map(|(job, message, damaged)| {
            ToCoordinator::JobFailed { job, kind: ErrorKind::Corrupt, message, bad_unit: None, damaged }
        }),
    ]
}
