//! Chat templates: how a conversation becomes a text, in the language and with the rules of transformers.
//!
//! A template may mark what the assistant says with `{% generation %}`; [`Rendered::answers`] has these parts.

mod environment;
mod python;
mod source;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use minijinja::value::{Serde, Value};
use minijinja::{Environment, Error};
use ulmus_types::for_people;

use self::environment::{BEGIN, END, environment, marked};
pub use self::source::TokenizerConfig;
use crate::error::ChatError;
use crate::message::{Message, SYSTEM};

/// The template of the published recipe (OpenELM's instruct models): every message is its role between `<|` and `|>`, a line
/// break, its content, EOS and a line break.
pub const RECIPE: &str = concat!(
    "{% for message in messages %}",
    "{% if message['role'] in ['system', 'user', 'assistant'] %}",
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}",
    "{% endif %}",
    "{% endfor %}",
    "{% if messages and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
);

/// What errors call [`RECIPE`].
const RECIPE_NAME: &str = "recipe";
/// The only template of an environment.
const CHAT: &str = "chat";
/// The longest reason in a message, in characters.
const REASON_LENGTH: usize = 400;

/// The names of special pieces that templates know: `bos_token`, `eos_token`, and more.
pub type SpecialNames = std::collections::BTreeMap<String, String>;

/// A chat template. Clones share it.
#[derive(Clone)]
pub struct Template(Arc<Compiled>);

struct Compiled {
    name: String,
    source: String,
    environment: Environment<'static>,
    tokens: SpecialNames,
}

/// A conversation as a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The parts of it that the template marks as the assistant's, as ranges of bytes, in order.
    pub answers: Vec<Range<usize>>,
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Template({})", self.name())
    }
}

impl Template {
    /// The template of the recipe.
    pub fn recipe(tokens: &SpecialNames) -> Self {
        Self::new(RECIPE_NAME, RECIPE, tokens, None)
            .expect("the recipe's template is in the language of templates")
    }

    /// Reads a template, which errors call `name`. `now` is the time that the template may ask for; without it, a template
    /// finds that there is none, so that what it gives depends on the conversation alone.
    ///
    /// # Errors
    /// [`ChatError::Template`] if it is not in the language of templates.
    pub fn new(
        name: &str,
        source: &str,
        tokens: &SpecialNames,
        now: Option<SystemTime>,
    ) -> Result<Self, ChatError> {
        let mut environment = environment(now);
        environment
            .add_template_owned(CHAT, marked(source))
            .map_err(|error| ChatError::Template { template: name.to_owned(), reason: reason(&error) })?;
        let (name, source) = (name.to_owned(), source.to_owned());
        Ok(Self(Arc::new(Compiled { name, source, environment, tokens: tokens.clone() })))
    }

    /// Where the template is from, for people.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The template as it was read.
    pub fn source(&self) -> &str {
        &self.0.source
    }

    /// Whether the template says what the assistant's parts are.
    pub fn marks_answers(&self) -> bool {
        environment::has_marks(self.source())
    }

    /// The text of a conversation; with `generation_prompt`, followed by what comes before an answer.
    ///
    /// # Errors
    /// [`ChatError::Refused`] if the template raises an exception, or fails.
    pub fn render(&self, messages: &[Message], generation_prompt: bool) -> Result<Rendered, ChatError> {
        let refused = |reason: String| ChatError::Refused { template: self.name().to_owned(), reason };
        if self.marks_answers() && messages.iter().any(|message| message.content.contains([BEGIN, END])) {
            return Err(refused(format!(
                "a message contains {BEGIN:?} or {END:?}, which are no characters of texts"
            )));
        }
        let tokens = self.0.tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str())));
        let given = [
            ("messages", Value::from(Serde(messages))),
            ("add_generation_prompt", Value::from(generation_prompt)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let context = Value::from_pairs(tokens.chain(given));
        let template =
            self.0.environment.get_template(CHAT).expect("the template was added when it was read");
        let text = template.render(context).map_err(|error| refused(reason(&error)))?;
        Ok(if self.marks_answers() { without_marks(&text) } else { Rendered { text, answers: Vec::new() } })
    }

    /// `messages` with an empty system message before them, if they begin with another one and the template has a place for
    /// it. So did the published recipe.
    pub fn with_empty_system(&self, messages: &[Message]) -> Vec<Message> {
        let begins_otherwise = messages.first().is_some_and(|first| first.role != SYSTEM);
        let empty =
            Some(Message::new(SYSTEM, "")).filter(|_| begins_otherwise && self.source().contains(SYSTEM));
        empty.into_iter().chain(messages.iter().cloned()).collect()
    }
}

/// Why a template failed, with the line where that is known.
fn reason(error: &Error) -> String {
    if let Some(raised) = environment::raised(error) {
        return for_people(raised, REASON_LENGTH);
    }
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let line = error.line().map(|line| format!(" in line {line}")).unwrap_or_default();
    for_people(&format!("{what}{line}"), REASON_LENGTH)
}

/// Takes the marks out of a text, and says what was between them.
fn without_marks(marked: &str) -> Rendered {
    let mut rendered = Rendered::default();
    let mut begin = 0;
    for piece in marked.split_inclusive([BEGIN, END]) {
        let text = piece.trim_end_matches([BEGIN, END]);
        rendered.text.push_str(text);
        match piece.chars().next_back() {
            Some(BEGIN) => begin = rendered.text.len(),
            Some(END) => rendered.answers.push(begin..rendered.text.len()),
            _ => {}
        }
    }
    rendered
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn tokens() -> SpecialNames {
        [("bos_token", "<s>"), ("eos_token", "</s>")]
            .map(|(name, token)| (name.to_owned(), token.to_owned()))
            .into()
    }

    fn render(source: &str, now: Option<SystemTime>) -> Result<String, ChatError> {
        let messages = [Message::new("user", "  a \"b\"\u{e9}\n"), Message::new("assistant", "c")];
        Ok(Template::new("test", source, &tokens(), now)?.render(&messages, false)?.text)
    }

    #[test]
    fn templates_are_read_as_transformers_reads_them() {
        for (source, text) in [
            // A line break after a block vanishes, blanks before one too, and those around an expression stay.
            ("{% if true %}\n  {% set a = 1 %}\n{{ a }}\n{% endif %}\n", "1\n"),
            ("{{ messages[0]['content'].strip() | upper }}", "A \"B\"\u{c9}"),
            ("{{ messages[0].content | tojson }}", "\"  a \\\"b\\\"\u{e9}\\n\""),
            (
                "{{ {'a': [1, 2.0, none, true], 'b': '<'} | tojson }}",
                r#"{"a": [1, 2.0, null, true], "b": "<"}"#,
            ),
            ("{{ {'a': [1], 'b': {}} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ],\n  \"b\": {}\n}"),
            ("{{ '\u{e9}\u{1f642}' | tojson(ensure_ascii=true) }}", "\"\\u00e9\\ud83d\\ude42\""),
            ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", r#"{"a":2,"b":1}"#),
            (
                "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ loop.index0 }}{% break %}{% endfor %}",
                "1",
            ),
            (
                "{{ none }} {{ true }} {{ false }} {{ 1.0 }} {{ ['a', none] }}",
                "None True False 1.0 ['a', None]",
            ),
            ("{{ messages[1:] | length }}{{ messages[0].items() | list | length }}", "12"),
            (
                "{{ tools is none }}{{ add_generation_prompt is defined }}{{ strftime_now is defined }}",
                "TrueTrueFalse",
            ),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ bos_token ~ ns.n }}",
                "<s>2",
            ),
            ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') }}{{ 'a,b'.split(',')[-1] }}", "[a]b"),
        ] {
            assert_eq!(render(source, None).as_deref(), Ok(text), "{source}");
        }
    }

    #[test]
    fn a_template_knows_no_time_but_the_one_that_is_given() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_hours(478_344);
        let source = "{{ strftime_now('%d %b %Y') }}";
        assert_eq!(render(source, Some(now)).as_deref(), Ok("27 Jul 2024"));
        let message = render(source, None).unwrap_err().to_string();
        assert!(message.contains("strftime_now"), "{message}");
        let message = render("{{ strftime_now('%Q!') }}", Some(now)).unwrap_err().to_string();
        assert!(message.contains("%Q!"), "{message}");
    }

    #[test]
    fn errors_name_the_template_and_the_reason() {
        for (source, words) in [
            ("{% if %}", ["test cannot be used", "line 1"]),
            ("\n{{ messages[0].none_such.deeper }}", ["test refuses the conversation", "line 2"]),
            (
                "{{ raise_exception('roles must alternate') }}",
                ["test refuses the conversation", ": roles must alternate; "],
            ),
        ] {
            let message = render(source, None).unwrap_err().to_string();
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        }
    }

    #[test]
    fn what_the_assistant_says_is_found() {
        let source = "{% for m in messages %}{{ m.role }}:\n{%- generation %}\n{{ m.content }}{% endgeneration %}\n{% endfor %}";
        let template = Template::new("test", source, &tokens(), None).unwrap();
        let rendered = template.render(&[Message::new("a", "x"), Message::new("b", "yz")], false).unwrap();
        assert_eq!(rendered.text, "a:xb:yz");
        let answers: Vec<&str> = rendered.answers.iter().map(|range| &rendered.text[range.clone()]).collect();
        assert_eq!(answers, ["x", "yz"]);
        assert!(template.render(&[Message::new("a", "\u{fdd0}")], false).is_err());
    }

    #[test]
    fn the_empty_system_message_stands_where_there_is_none() {
        let recipe = Template::recipe(&tokens());
        let roles = |template: &Template, roles: &[&str]| {
            let messages: Vec<Message> = roles.iter().map(|role| Message::new(role, "x")).collect();
            template.with_empty_system(&messages).into_iter().map(|message| message.role).collect::<Vec<_>>()
        };
        assert_eq!(roles(&recipe, &["user"]), ["system", "user"]);
        assert_eq!(roles(&recipe, &["system"]), ["system"]);
        assert!(roles(&recipe, &[]).is_empty());
        let plain = Template::new("test", "{{ messages }}", &tokens(), None).unwrap();
        assert_eq!(roles(&plain, &["user"]), ["user"]);
    }
}
