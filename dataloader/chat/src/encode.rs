//! From texts to token ids: where BOS and EOS stand, which tokens are answers, and what is left of an example that is too long.
//!
//! [`Tokenization::Chat`] is the practice of today. A conversation is what its template says; a plain text gets BOS, and EOS if
//! it has none. An answer begins where the ids of prompt and answer part from those of the prompt.
//!
//! [`Tokenization::Recipe`] is TRL 0.8.2, which the published recipe used. BOS stands before the prompt and EOS behind the
//! answer, even if the template has put one there. If the last token of the prompt is another one before the answer, then it
//! belongs to the answer.
//!
//! Labels go by position. That a padding token has the id of EOS therefore hides no EOS.

use std::ops::Range;

use ulmus_plan::{Method, OnUseless, Tokenization, Truncation, TuneConfig};
use ulmus_tokenizer::{SpecialEncoder, Tokenizer};
use ulmus_types::IGNORE;

use crate::error::ChatError;
use crate::example::{Example, Pair, common, cut};
use crate::reason::Reason;
use crate::template::Rendered;

/// How rows become examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// What is learned from: answers, or preferences.
    pub method: Method,
    /// Whether only the prompts of rows are read, whatever answers they have: answers are sampled later.
    pub prompts_only: bool,
    /// The practice that is followed.
    pub tokenization: Tokenization,
    /// Which end of what is too long stays.
    pub truncation: Truncation,
    /// Longest example in tokens.
    pub max_length: usize,
    /// Longest prompt of an example that is too long, in the recipe; or longest prompt of which answers are sampled.
    pub max_prompt: usize,
    /// Whether only answers are learned, where there is a single one.
    pub mask_prompt: bool,
    /// What happens to rows that teach nothing.
    pub on_useless: OnUseless,
}

impl Rules {
    /// Those for the data of a stage: of rows to whose prompts it samples answers, only the prompts are read.
    pub fn of_data(config: &TuneConfig) -> Self {
        Self { prompts_only: config.rso.is_some(), ..Self::from(config) }
    }
}

impl From<&TuneConfig> for Rules {
    fn from(config: &TuneConfig) -> Self {
        Self {
            method: config.method,
            prompts_only: false,
            tokenization: config.tokenization,
            truncation: config.truncation,
            max_length: config.max_length as usize,
            max_prompt: config.max_prompt as usize,
            mask_prompt: config.mask_prompt,
            on_useless: config.on_useless,
        }
    }
}

/// Turns texts into ids.
#[derive(Debug, Clone)]
pub(crate) struct Encoding {
    encoder: SpecialEncoder,
    bos: Option<u32>,
    eos: u32,
    rules: Rules,
}

impl Encoding {
    /// Without `adds_bos`, no text begins with BOS unless it is written out.
    pub(crate) fn new(tokenizer: &Tokenizer, adds_bos: bool, rules: Rules) -> Self {
        let bos = adds_bos.then(|| tokenizer.bos());
        Self { encoder: tokenizer.special_encoder(), bos, eos: tokenizer.eos(), rules }
    }

    /// Whether names of special pieces are in one of some texts.
    pub(crate) fn has_special(&self, texts: &[&str]) -> bool {
        texts.iter().any(|text| self.encoder.has_special(text))
    }

    /// One text. `is_plain` says that no template has made it.
    pub(crate) fn example(
        &mut self,
        text: &str,
        answers: &[Range<usize>],
        is_plain: bool,
    ) -> Result<Example, Reason> {
        let Rules { max_length, truncation, mask_prompt, on_useless, .. } = self.rules;
        let Example { mut ids, mut labels } = if mask_prompt {
            learned(&mut self.encoder, text, answers)
        } else {
            Example::learned_from(self.encoded(text), 0)
        };
        let label = |id: u32, is_learned: bool| if is_learned { id } else { IGNORE };
        if let Some(bos) = self.bos_before(&ids, is_plain) {
            ids.insert(0, bos);
            labels.insert(0, label(bos, !mask_prompt));
        }
        if let Some(eos) = self.eos_behind(&ids, is_plain) {
            ids.push(eos);
            labels.push(label(eos, !mask_prompt || answers.iter().any(|answer| answer.end == text.len())));
        }
        let mut example = Example { ids, labels };
        let before = example.targets();
        let has_prompt = mask_prompt && answers.first().is_some_and(|answer| answer.start > 0);
        example.cut(max_length, truncation);
        let begins_within = has_prompt && !example.labels.contains(&IGNORE);
        if begins_within && on_useless == OnUseless::Drop {
            return Err(Reason::LongAnswer);
        }
        match (before, example.targets()) {
            (0, _) => Err(Reason::NothingLearned),
            (_, 0) => Err(Reason::LongPrompt),
            _ => Ok(example),
        }
    }

    /// A prompt of which answers are sampled.
    pub(crate) fn prompt(&mut self, text: &str, is_plain: bool) -> Result<Vec<u32>, Reason> {
        let ids = self.begun(text, is_plain);
        if ids.len() <= self.rules.max_prompt { Ok(ids) } else { Err(Reason::OverMaxPrompt) }
    }

    /// Two answers to a prompt.
    pub(crate) fn pair(
        &mut self,
        [prompt, chosen, rejected]: [&str; 3],
        is_plain: bool,
    ) -> Result<Result<Pair, Reason>, ChatError> {
        let pair = match self.rules.tokenization {
            Tokenization::Chat => self.pair_of_today(prompt, [chosen, rejected], is_plain),
            Tokenization::Recipe => Ok(self.pair_of_recipe(prompt, [chosen, rejected])?),
        };
        // What differed may have been cut off.
        let is_useless =
            |pair: &Pair| pair.chosen == pair.rejected && self.rules.on_useless == OnUseless::Drop;
        Ok(pair.and_then(|pair| if is_useless(&pair) { Err(Reason::Identical) } else { Ok(pair) }))
    }

    fn pair_of_today(&mut self, prompt: &str, answers: [&str; 2], is_plain: bool) -> Result<Pair, Reason> {
        let Rules { max_length, truncation, .. } = self.rules;
        let mut prompt = self.begun(prompt, is_plain);
        let mut sequences = answers.map(|text| {
            let mut ids = self.begun(text, is_plain);
            ids.extend(self.eos_behind(&ids, is_plain));
            ids
        });
        let shared = sequences.iter().map(|ids| common(&prompt, ids)).min().unwrap_or_default();
        prompt.truncate(shared);
        let mut answers = sequences.each_mut().map(|ids| ids.split_off(shared));
        let longer = answers.iter().map(Vec::len).max().unwrap_or_default();
        match truncation {
            Truncation::KeepStart if prompt.len() >= max_length => return Err(Reason::LongPrompt),
            Truncation::KeepStart => {
                for ids in &mut answers {
                    ids.truncate(max_length - prompt.len());
                }
            }
            Truncation::KeepEnd if longer >= max_length => return Err(Reason::LongAnswer),
            Truncation::KeepEnd => cut(&mut prompt, max_length - longer, truncation),
        }
        let [chosen, rejected] = answers;
        Ok(Pair::of_answers(prompt, chosen, rejected))
    }

    fn pair_of_recipe(&mut self, prompt: &str, answers: [&str; 2]) -> Result<Pair, ChatError> {
        let Rules { max_length, max_prompt, truncation, .. } = self.rules;
        let alone = self.encoded(prompt);
        let mut parts = Vec::with_capacity(2);
        for (text, name) in answers.into_iter().zip(["chosen", "rejected"]) {
            let mut prompt = self.encoded(text);
            if prompt.len() < alone.len() {
                return Err(ChatError::Border { answer: name });
            }
            let is_same = prompt.starts_with(&alone);
            let mut answer =
                prompt.split_off(if is_same { alone.len() } else { alone.len().saturating_sub(1) });
            answer.push(self.eos);
            parts.push((prompt, answer));
        }
        let different = parts[0].0.iter().zip(&parts[1].0).filter(|(one, other)| one != other).count();
        if different > 1 {
            return Err(ChatError::Border { answer: "rejected" });
        }
        let longer = parts.iter().map(|(_, answer)| answer.len()).max().unwrap_or_default();
        for (prompt, answer) in &mut parts {
            let bos = self.bos_before(prompt, false);
            prompt.splice(0..0, bos);
            if prompt.len() + longer > max_length {
                cut(prompt, max_prompt, truncation);
            }
            if prompt.len() + longer > max_length {
                answer.truncate(max_length.saturating_sub(max_prompt));
            }
        }
        let shared = common(&parts[0].0, &parts[1].0);
        let [chosen, rejected] = [0, 1].map(|at| {
            let (prompt, answer) = &parts[at];
            let own = prompt.len() - shared;
            Example::learned_from([&prompt[shared..], answer].concat(), own)
        });
        Ok(Pair { prompt: parts[0].0[..shared].to_vec(), chosen, rejected })
    }

    fn encoded(&mut self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        self.encoder.encode(text, &mut ids);
        ids
    }

    /// The ids of a text that an example begins with.
    fn begun(&mut self, text: &str, is_plain: bool) -> Vec<u32> {
        let mut ids = self.encoded(text);
        let bos = self.bos_before(&ids, is_plain);
        ids.splice(0..0, bos);
        ids
    }

    /// BOS, if it is to stand before these ids and does not yet.
    fn bos_before(&self, ids: &[u32], is_plain: bool) -> Option<u32> {
        let gets_bos = is_plain || self.rules.tokenization == Tokenization::Recipe;
        self.bos.filter(|bos| gets_bos && ids.first() != Some(bos))
    }

    /// EOS, if it is to stand behind these ids. In the recipe it does so even if it is there already.
    fn eos_behind(&self, ids: &[u32], is_plain: bool) -> Option<u32> {
        let gets_eos = match self.rules.tokenization {
            Tokenization::Chat => is_plain && ids.last() != Some(&self.eos),
            Tokenization::Recipe => true,
        };
        gets_eos.then_some(self.eos)
    }
}

/// The ids of a text, of which some parts are learned. A token across the border of a part belongs to it.
pub(crate) fn learned(encoder: &mut SpecialEncoder, text: &str, parts: &[Range<usize>]) -> Example {
    let mut encode = |text: &str| {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        encoder.encode(text, &mut ids);
        ids
    };
    let ids = encode(text);
    let mut labels = vec![IGNORE; ids.len()];
    // The tokens before a border are those with which the text up to there begins, too.
    for part in parts {
        let begin = common(&encode(&text[..part.start]), &ids);
        let until = encode(&text[..part.end]);
        let whole = common(&until, &ids);
        let end = (whole + usize::from(whole < until.len())).min(ids.len());
        let tokens = begin..end.max(begin);
        labels[tokens.clone()].copy_from_slice(&ids[tokens]);
    }
    Example { ids, labels }
}

impl Example {
    /// The ids of a conversation, of which the parts are learned that its template marks. No BOS or EOS is added.
    pub fn of_rendered(rendered: &Rendered, encoder: &mut SpecialEncoder) -> Self {
        learned(encoder, &rendered.text, &rendered.answers)
    }
}
