//! From texts to the ids that go through the model, and those of them that are scored.

use std::ops::Range;

use ulmus_tokenizer::{SpecialEncoder, Tokenizer};

use super::definition::Revision;
use crate::python::string::rstrip;

/// Ids of which the last ones are scored. The model reads all but the last.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Request {
    /// At least two.
    pub ids: Vec<u32>,
    /// At least one, and fewer than there are ids.
    pub scored: usize,
}

/// How texts become ids.
pub(crate) struct Encoding {
    encoder: SpecialEncoder,
    bos: (String, u32),
    add_bos: bool,
    /// The only context of a text that has none.
    prefix: u32,
    /// The most ids that the model reads.
    context: usize,
    revision: Revision,
    /// The last context, and its ids: the choices of a question share it.
    last: (String, Vec<u32>),
    /// Whether a control token was written out in a text since this was last unset.
    pub written_out: bool,
    /// Requests whose beginning was cut off.
    pub truncated: usize,
}

impl Encoding {
    pub(crate) fn new(tokenizer: &Tokenizer, add_bos: bool, context: usize, revision: Revision) -> Self {
        let bos = (tokenizer.special_names().0.to_owned(), tokenizer.bos());
        let prefix = match revision {
            Revision::Current => tokenizer.bos(),
            Revision::Dc90fec => tokenizer.eos(),
        };
        Self {
            encoder: tokenizer.special_encoder(),
            add_bos,
            prefix,
            context,
            revision,
            bos,
            last: (String::new(), Vec::new()),
            written_out: false,
            truncated: 0,
        }
    }

    /// The ids of a text, with BOS if configured.
    pub(crate) fn encode(&mut self, text: &str) -> Vec<u32> {
        let (bos_name, bos) = &self.bos;
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if self.add_bos && !text.starts_with(bos_name) {
            ids.push(*bos);
        }
        self.append(text, &mut ids);
        ids
    }

    /// Appends the ids of a text without a BOS of its own.
    fn append(&mut self, text: &str, ids: &mut Vec<u32>) {
        self.written_out |= self.encoder.encode(text, ids);
    }

    /// A continuation of a context, which is cut off at its beginning if it is too long.
    ///
    /// # Errors
    /// The number of ids of a continuation that is too long by itself.
    pub(crate) fn continuation(&mut self, context: &str, continuation: &str) -> Result<Request, usize> {
        let (context, scored) = if context.is_empty() {
            let mut scored = Vec::new();
            match self.revision {
                Revision::Current => self.append(continuation, &mut scored),
                Revision::Dc90fec => scored = self.encode(continuation),
            }
            if self.revision == Revision::Current && scored.len() > 1 && scored[0] == self.prefix {
                (vec![scored.remove(0)], scored)
            } else {
                (vec![self.prefix], scored)
            }
        } else {
            let kept = rstrip(context);
            let whole = self.encode(&format!("{context}{continuation}"));
            if self.last.1.is_empty() || self.last.0 != kept {
                self.last = (kept.to_owned(), self.encode(kept));
            }
            let context = self.last.1.clone();
            let scored = whole[context.len().min(whole.len())..].to_vec();
            (if context.is_empty() { vec![self.prefix] } else { context }, scored)
        };
        if scored.is_empty() || scored.len() > self.context {
            return Err(scored.len());
        }
        let mut ids = context;
        let count = scored.len();
        ids.extend(scored);
        let excess = ids.len().saturating_sub(self.context + 1);
        ids.drain(..excess);
        self.truncated += usize::from(excess > 0);
        Ok(Request { ids, scored: count })
    }

    /// A whole text in windows, in which every id is scored once.
    pub(crate) fn rolling(&mut self, text: &str) -> Vec<Request> {
        let ids = self.encode(text);
        windows(ids.len(), self.context)
            .map(|Window { read, scored }| {
                let mut window = Vec::with_capacity(scored.end - read + 1);
                // Before the first id stands the prefix.
                window.extend((read == 0).then_some(self.prefix));
                window.extend(&ids[read.saturating_sub(1)..scored.end]);
                Request { ids: window, scored: scored.len() }
            })
            .collect()
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Window {
    /// The first position whose prediction the model makes: it reads the id before.
    read: usize,
    scored: Range<usize>,
}

/// Windows of at most `context` predictions, each of which scores what follows on the one before. The last is shifted back so
/// that the model reads as much as in the others.
fn windows(count: usize, context: usize) -> impl Iterator<Item = Window> {
    (0..count).step_by(context).map(move |start| {
        let end = count.min(start + context);
        Window { read: end.saturating_sub(context), scored: start..end }
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn encoding(context: usize, revision: Revision) -> Encoding {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny/tokenizer.model");
        let tokenizer =
            Tokenizer::read(&std::fs::read(file).unwrap(), "tokenizer.model", None, None).unwrap();
        Encoding::new(&tokenizer, true, context, revision)
    }

    #[test]
    fn control_tokens_that_are_written_out_are_read_as_such() {
        let mut encoding = encoding(100, Revision::Current);
        let mut plain = |text: &str| encoding.encode(text)[1..].to_vec();
        let [a, b] = ["a", "b"].map(&mut plain);
        assert!(!encoding.written_out);
        assert_eq!(encoding.encode("a<unk>b"), [vec![1], a.clone(), vec![0], b].concat());
        assert!(encoding.written_out);
        // A text that begins with BOS gets no other.
        assert_eq!(encoding.encode("<s>a</s>"), [vec![1], a, vec![2]].concat());
    }

    #[test]
    fn a_text_without_a_context_follows_the_prefix() {
        let now = encoding(100, Revision::Current).continuation("", "a").unwrap();
        assert_eq!((now.ids[0], now.scored), (1, now.ids.len() - 1));
        // Earlier, the prefix was EOS, and the text began with BOS.
        let earlier = encoding(100, Revision::Dc90fec).continuation("", "a").unwrap();
        assert_eq!((&earlier.ids[..2], earlier.scored), (&[2, 1][..], now.scored + 1));
    }

    #[test]
    fn what_is_too_long_loses_its_beginning_and_a_choice_must_fit() {
        let whole = encoding(100, Revision::Current).continuation("some words before", " a").unwrap();
        let mut encoding = encoding(4, Revision::Current);
        let cut = encoding.continuation("some words before", " a").unwrap();
        assert_eq!((&cut.ids[..], cut.scored), (&whole.ids[whole.ids.len() - 5..], whole.scored));
        assert_eq!(encoding.truncated, 1);
        assert!(encoding.continuation("a", " many words that are a choice").unwrap_err() > 4);
    }
}
