//! The forms in which chat and preference data come, recognised by their columns.

use ulmus_plan::Method;

use crate::error::ChatError;

/// A form of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `messages`: whole conversations.
    Messages,
    /// `conversations` of `from` and `value`.
    ShareGpt,
    /// `prompt` and `completion`, both texts or both messages.
    PromptCompletion,
    /// `instruction`, perhaps `input`, and `output`.
    Instructions,
    /// `text` alone.
    Text,
    /// `prompt` alone.
    Prompts,
    /// `UltraFeedback`, binarised and cleaned: `chosen-rating` and others beside conversations.
    UltraFeedbackCleaned,
    /// `UltraFeedback`, binarised: `prompt_id`, `score_chosen` and others beside conversations.
    UltraFeedback,
    /// `prompt`, `chosen` and `rejected`.
    Preferences,
    /// `chosen` and `rejected`, which begin with the same prompt.
    ImplicitPreferences,
}

impl Form {
    /// The form of rows with these columns, from which `method` can learn.
    ///
    /// # Errors
    /// [`ChatError::Form`] if it is none that is known, or the method learns from another.
    pub fn of(columns: &[&str], method: Method) -> Result<Self, ChatError> {
        let has = |names: &[&str]| names.iter().all(|name| columns.contains(name));
        let wrong = |found, wanted| {
            let columns = columns.iter().map(|name| (*name).to_owned()).collect();
            Err(ChatError::Form { columns, found, wanted })
        };
        let examples = if has(&["messages"]) {
            Some(Self::Messages)
        } else if has(&["conversations"]) {
            Some(Self::ShareGpt)
        } else if has(&["instruction", "output"]) {
            Some(Self::Instructions)
        } else if has(&["prompt", "completion"]) && !has(&["label"]) {
            Some(Self::PromptCompletion)
        } else if has(&["text"]) {
            Some(Self::Text)
        } else {
            None
        };
        let preferences = if !has(&["chosen", "rejected"]) {
            None
        } else if has(&["prompt", "chosen-rating", "rejected-rating"]) {
            Some(Self::UltraFeedbackCleaned)
        } else if has(&["prompt", "prompt_id", "score_chosen", "score_rejected"]) {
            Some(Self::UltraFeedback)
        } else if has(&["prompt"]) {
            Some(Self::Preferences)
        } else {
            Some(Self::ImplicitPreferences)
        };
        match (method, examples, preferences) {
            (Method::Sft, Some(form), _) | (Method::Dpo, _, Some(form)) => Ok(form),
            (Method::Sft, None, Some(_)) => {
                wrong("those of preferences", "set method = \"dpo\", or name data with messages or answers")
            }
            (Method::Dpo, Some(_), None) => wrong(
                "those of single answers",
                "set method = \"sft\", or name data with chosen and rejected answers",
            ),
            (_, None, None) if has(&["prompt", "completion", "label"]) => wrong(
                "those of answers that are each marked as good or bad",
                "keep the good ones, leave label out and set method = \"sft\", or name data with chosen and rejected answers",
            ),
            (Method::Sft, None, None) => wrong(
                "of no known form",
                "sft learns from messages, conversations, prompt and completion, instruction and output, or text",
            ),
            (Method::Dpo, None, None) => {
                wrong("of no known form", "dpo learns from chosen and rejected, with or without prompt")
            }
        }
    }

    /// The form of rows with these columns, of which only prompts are read.
    ///
    /// # Errors
    /// [`ChatError::Form`] if there is no prompt in them.
    pub fn of_prompts(columns: &[&str]) -> Result<Self, ChatError> {
        let answered =
            [Method::Dpo, Method::Sft].into_iter().filter_map(|method| Self::of(columns, method).ok());
        let alone = columns.contains(&"prompt").then_some(Self::Prompts);
        answered.filter(|form| *form != Self::Text).chain(alone).next().ok_or_else(|| ChatError::Form {
            columns: columns.iter().map(|name| (*name).to_owned()).collect(),
            found: "of no form with prompts",
            wanted: "answers are sampled to a prompt, to messages, or to the prompts of preferences",
        })
    }

    /// What the form is called, for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Messages => "conversations (messages)",
            Self::ShareGpt => "conversations (ShareGPT)",
            Self::PromptCompletion => "prompts and completions",
            Self::Instructions => "instructions (Alpaca)",
            Self::Text => "texts",
            Self::Prompts => "prompts",
            Self::UltraFeedbackCleaned => "preferences (UltraFeedback, cleaned)",
            Self::UltraFeedback => "preferences (UltraFeedback, binarised)",
            Self::Preferences => "preferences with prompts",
            Self::ImplicitPreferences => "preferences without prompts",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_is_recognised_by_its_columns() {
        let sft = |columns: &str| Form::of(&columns.split(' ').collect::<Vec<_>>(), Method::Sft).unwrap();
        let dpo = |columns: &str| Form::of(&columns.split(' ').collect::<Vec<_>>(), Method::Dpo).unwrap();
        assert_eq!(sft("prompt prompt_id messages"), Form::Messages);
        assert_eq!(sft("id conversations"), Form::ShareGpt);
        assert_eq!(sft("instruction input output text"), Form::Instructions);
        assert_eq!(sft("prompt completion"), Form::PromptCompletion);
        assert_eq!(sft("text"), Form::Text);
        let cleaned =
            "source prompt chosen chosen-rating chosen-model rejected rejected-rating rejected-model";
        assert_eq!(dpo(cleaned), Form::UltraFeedbackCleaned);
        let binarised = "prompt prompt_id chosen rejected messages score_chosen score_rejected";
        assert_eq!((dpo(binarised), sft(binarised)), (Form::UltraFeedback, Form::Messages));
        assert_eq!(dpo("prompt chosen rejected"), Form::Preferences);
        assert_eq!(dpo("rejected chosen"), Form::ImplicitPreferences);
    }

    #[test]
    fn prompts_come_in_every_form_that_has_some() {
        let of = |columns: &str| Form::of_prompts(&columns.split(' ').collect::<Vec<_>>());
        assert_eq!(of("prompt").unwrap(), Form::Prompts);
        assert_eq!(of("prompt completion label").unwrap(), Form::Prompts);
        assert_eq!(of("prompt chosen rejected").unwrap(), Form::Preferences);
        assert_eq!(of("chosen rejected messages").unwrap(), Form::ImplicitPreferences);
        assert_eq!(of("prompt messages").unwrap(), Form::Messages);
        assert_eq!(of("prompt text").unwrap(), Form::Prompts);
        assert!(
            of("text").unwrap_err().to_string().contains("are of no form with prompts; answers are sampled")
        );
    }

    #[test]
    fn a_form_that_a_method_cannot_learn_from_is_refused_with_another() {
        for (columns, method, words) in [
            ("chosen rejected", Method::Sft, "set method = \"dpo\""),
            ("messages", Method::Dpo, "set method = \"sft\""),
            ("prompt completion label", Method::Sft, "leave label out"),
            ("prompt completion label", Method::Dpo, "marked as good or bad"),
            ("a b", Method::Sft, "[\"a\", \"b\"] are of no known form; sft learns from messages"),
            ("a b", Method::Dpo, "dpo learns from chosen and rejected"),
        ] {
            let message = Form::of(&columns.split(' ').collect::<Vec<_>>(), method).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
