//! What training changes and checkpoints keep: the trained weights, and the optimizer's moments of them.

use ulmus_backend::HostCopy;

/// One of the three flat vectors that make up the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StatePart {
    /// The trained weights.
    Weights,
    /// AdamW's first moment.
    FirstMoment,
    /// AdamW's second moment.
    SecondMoment,
}

impl StatePart {
    /// All parts, in the order in which they are hashed.
    pub const ALL: [Self; 3] = [Self::Weights, Self::FirstMoment, Self::SecondMoment];
}

/// The state on the host: flat vectors of the trained parameters, in the order of [`Replica::layout`](crate::Replica::layout).
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// The weights.
    pub weights: Vec<f32>,
    /// AdamW's first moment.
    pub first_moment: Vec<f32>,
    /// AdamW's second moment.
    pub second_moment: Vec<f32>,
}

/// A copy of the state on the host. It may still be under way while training goes on.
#[derive(Debug)]
pub struct StateCopy(pub(crate) [Box<dyn HostCopy>; 3]);

impl StateCopy {
    /// One of its vectors; waits until the copy of it is complete.
    pub fn part(&self, part: StatePart) -> &[f32] {
        let [weights, first_moment, second_moment] = &self.0;
        match part {
            StatePart::Weights => weights.values(),
            StatePart::FirstMoment => first_moment.values(),
            StatePart::SecondMoment => second_moment.values(),
        }
    }
}

impl From<State> for StateCopy {
    fn from(state: State) -> Self {
        let State { weights, first_moment, second_moment } = state;
        Self([Box::new(weights), Box::new(first_moment), Box::new(second_moment)])
    }
}
