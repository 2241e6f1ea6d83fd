//! Where templates are kept: beside a tokenizer.

use serde_json::Value;
use ulmus_types::without_mark;

use super::SpecialNames;
use crate::error::ChatError;

/// The names of special pieces that `tokenizer_config.json` may have and templates may use.
const TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// The name of the template that is meant where there are several.
const DEFAULT: &str = "default";

/// What a `tokenizer_config.json` says about templates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenizerConfig {
    /// The chat template, if it has one.
    pub template: Option<String>,
    /// The names of special pieces.
    pub tokens: SpecialNames,
    /// Whether texts begin with BOS, if it says so.
    pub adds_bos: Option<bool>,
}

impl TokenizerConfig {
    /// Reads a `tokenizer_config.json`, which errors call `name`.
    ///
    /// # Errors
    /// When it is not JSON, or its template is neither a text nor a list of named texts with one for all uses.
    pub fn read(bytes: &[u8], name: &str) -> Result<Self, ChatError> {
        let config = json(bytes, name)?;
        let template = template(&config["chat_template"])
            .map_err(|reason| ChatError::TokenizerConfig { file: name.to_owned(), reason })?;
        Ok(Self { template, tokens: tokens(&config), adds_bos: config["add_bos_token"].as_bool() })
    }

    /// The names of special pieces in a `tokenizer_config.json`, whatever its template is.
    ///
    /// # Errors
    /// When it is not JSON.
    pub fn names(bytes: &[u8], name: &str) -> Result<SpecialNames, ChatError> {
        Ok(tokens(&json(bytes, name)?))
    }
}

fn json(bytes: &[u8], name: &str) -> Result<Value, ChatError> {
    serde_json::from_slice(without_mark(bytes)).map_err(|error| ChatError::TokenizerConfig {
        file: name.to_owned(),
        reason: format!("it is not JSON ({error})"),
    })
}

fn tokens(config: &Value) -> SpecialNames {
    // A token is written as its name, or as an object with its name.
    let text = |key: &str| config[key].as_str().or_else(|| config[key]["content"].as_str());
    TOKENS.iter().filter_map(|key| Some(((*key).to_owned(), text(key)?.to_owned()))).collect()
}

fn template(value: &Value) -> Result<Option<String>, String> {
    match value {
        Value::Null => Ok(None),
        Value::String(template) => Ok(Some(template.clone())),
        Value::Array(named) => {
            let name = |entry: &Value| entry["name"].as_str().unwrap_or_default().to_owned();
            let default = named.iter().find(|entry| name(entry) == DEFAULT).or(if named.len() == 1 {
                named.first()
            } else {
                None
            });
            let names: Vec<String> = named.iter().map(name).collect();
            let template = default.and_then(|entry| entry["template"].as_str()).map(str::to_owned);
            template
                .map(Some)
                .ok_or_else(|| format!("of its chat templates {names:?}, none is called {DEFAULT:?}"))
        }
        _ => Err("its chat_template is neither a text nor a list of named ones".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: &str) -> Result<TokenizerConfig, ChatError> {
        TokenizerConfig::read(config.as_bytes(), "tokenizer_config.json")
    }

    #[test]
    fn a_template_is_a_text_or_one_of_several() {
        for (config, template) in [
            ("{}", None),
            (r#"{"chat_template": "x"}"#, Some("x")),
            (
                r#"{"chat_template": [{"name": "tool_use", "template": "y"}, {"name": "default", "template": "x"}]}"#,
                Some("x"),
            ),
            (r#"{"chat_template": [{"name": "only", "template": "x"}]}"#, Some("x")),
        ] {
            assert_eq!(read(config).unwrap().template.as_deref(), template, "{config}");
        }
        let several =
            r#"{"chat_template": [{"name": "rag", "template": "y"}, {"name": "tool_use", "template": "x"}]}"#;
        for (config, words) in
            [(several, r#"["rag", "tool_use"]"#), (r#"{"chat_template": 1}"#, "neither"), ("{", "not JSON")]
        {
            let message = read(config).unwrap_err().to_string();
            assert!(message.contains(words) && message.starts_with("tokenizer_config.json"), "{message}");
        }
    }

    #[test]
    fn special_pieces_are_names_or_objects() {
        let config = read(
            r#"{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null, "add_bos_token": true}"#,
        );
        let config = config.unwrap();
        let tokens: Vec<(&str, &str)> =
            config.tokens.iter().map(|(name, token)| (name.as_str(), token.as_str())).collect();
        assert_eq!(
            (tokens, config.adds_bos),
            (vec![("bos_token", "<s>"), ("eos_token", "</s>")], Some(true))
        );
    }
}
