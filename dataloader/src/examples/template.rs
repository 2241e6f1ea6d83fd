//! Reads what turns rows into examples: the chat template, and the texts that no row may contain.

use std::path::Path;
use std::time::SystemTime;

use ulmus_chat::{
    ChatError, Forbidden, Preprocessor, Renderer, Rules, SpecialNames, Template, TokenizerConfig,
};
use ulmus_plan::TuneConfig;
use ulmus_tokenizer::{TRAINED_NAMES, Tokenizer};
use ulmus_types::Of;

use super::tokenizer::PlanTokenizer;
use crate::address::folder_and_name;
use crate::error::DataError;
use crate::store::Folder;

/// The template that a tokenizer brings along, or else the recipe's.
const AUTO: &str = "auto";
/// The template of the published recipe.
const RECIPE: &str = "recipe";
/// The file of a chat template, in the folder of a model or of an adapter.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// Where a tokenizer keeps its template, the first place before the second.
const PLACES: [&str; 2] = [CHAT_TEMPLATE, "tokenizer_config.json"];

/// A chat template, and what its tokenizer does with plain texts.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    /// The template.
    pub template: Template,
    /// Whether plain texts begin with BOS.
    pub adds_bos: bool,
}

/// Reads the chat template that a plan names: `auto`, `recipe` or a file. `model` is the folder of the tokenizer; `now` is the
/// time that templates may ask for, if they may.
///
/// # Errors
/// When a file cannot be read, or is no template.
pub fn read_template(
    choice: &str,
    model: &Folder,
    tokenizer: &Tokenizer,
    now: Option<SystemTime>,
) -> Result<ChatTemplate, DataError> {
    template(choice, Some(model), tokenizer.special_names(), now)
}

/// The chat template of a tuning stage whose run has this tokenizer, or will train one. A template is told that there is no time, so
/// that what is learned does not depend on the day.
///
/// # Errors
/// Those of [`read_template`].
pub fn stage_template(
    config: &TuneConfig,
    tokenizer: Option<&PlanTokenizer>,
) -> Result<ChatTemplate, DataError> {
    let names = tokenizer.map_or(TRAINED_NAMES, |found| found.tokenizer.special_names());
    let own = match &config.of {
        Of::Model(place) if config.template == AUTO => folder_with_template(place)?,
        _ => None,
    };
    let folder = own.as_ref().or(tokenizer.map(|found| &found.folder));
    template(&config.template, folder, names, Some(SystemTime::UNIX_EPOCH))
}

/// The folder of a model, if it has a chat template.
fn folder_with_template(place: &str) -> Result<Option<Folder>, DataError> {
    let folder = if place.starts_with("hf://") {
        Folder::open_model(place)?
    } else if Path::new(place).is_dir() {
        Folder::open(place)?
    } else {
        return Ok(None);
    };
    let [jinja, _] = PLACES;
    let has_template = folder.read(jinja)?.is_some() || tokenizer_config(&folder)?.template.is_some();
    Ok(has_template.then_some(folder))
}

/// What makes examples of rows of a tuning stage, by these rules.
///
/// # Errors
/// Those of [`read_template`] and [`read_forbidden`].
pub fn preprocessor(
    config: &TuneConfig,
    rules: Rules,
    tokenizer: &PlanTokenizer,
) -> Result<Preprocessor, DataError> {
    let ChatTemplate { template, adds_bos } = stage_template(config, Some(tokenizer))?;
    let forbidden = config.decontaminate.as_deref().map(read_forbidden).transpose()?;
    Ok(Preprocessor::new(rules, template, &tokenizer.tokenizer, adds_bos, forbidden))
}

/// What makes texts of rows of a tuning stage, by these rules, whose run will train its tokenizer.
///
/// # Errors
/// Those of [`preprocessor`].
pub fn renderer(config: &TuneConfig, rules: Rules) -> Result<Renderer, DataError> {
    let template = stage_template(config, None)?.template;
    let forbidden = config.decontaminate.as_deref().map(read_forbidden).transpose()?;
    Ok(Renderer::new(rules, template, forbidden))
}

/// The files beside a tokenizer that say how it is used, its chat template above all.
///
/// # Errors
/// When one cannot be read.
pub fn template_files(folder: &Folder) -> Result<Vec<(&'static str, Vec<u8>)>, DataError> {
    let read = |name| Ok(folder.read(name)?.map(|contents| (name, contents)));
    PLACES.into_iter().filter_map(|name| read(name).transpose()).collect()
}

/// The names of special pieces that the folder of a tokenizer says.
pub(super) fn special_names(folder: &Folder) -> Result<SpecialNames, DataError> {
    let [_, config] = PLACES;
    let place = folder.place(config);
    let names = folder.read(config)?.map(|bytes| TokenizerConfig::names(&bytes, &place));
    names.transpose().map(Option::unwrap_or_default).map_err(|error| of_place(place, error))
}

/// What the folder of a tokenizer says about it.
fn tokenizer_config(folder: &Folder) -> Result<TokenizerConfig, DataError> {
    let [_, config] = PLACES;
    let Some(bytes) = folder.read(config)? else { return Ok(TokenizerConfig::default()) };
    let place = folder.place(config);
    TokenizerConfig::read(&bytes, &place).map_err(|error| of_place(place, error))
}

fn template(
    choice: &str,
    model: Option<&Folder>,
    (bos, eos): (&str, &str),
    now: Option<SystemTime>,
) -> Result<ChatTemplate, DataError> {
    let [jinja, config_file] = PLACES;
    let TokenizerConfig { template: of_config, mut tokens, adds_bos } =
        model.map(tokenizer_config).transpose()?.unwrap_or_default();
    for (name, token) in [("bos_token", bos), ("eos_token", eos)] {
        tokens.entry(name.to_owned()).or_insert_with(|| token.to_owned());
    }
    let compiled = |place: String, source: &str| {
        Template::new(&place, source, &tokens, now).map_err(|error| of_place(place, error))
    };
    let template = match (choice, model) {
        (RECIPE, _) | (AUTO, None) => Template::recipe(&tokens),
        (AUTO, Some(model)) => match (model.read(jinja)?, of_config) {
            (Some(bytes), _) => compiled(model.place(jinja), &text(&model.place(jinja), bytes)?)?,
            (None, Some(source)) => compiled(model.place(config_file), &source)?,
            (None, None) => Template::recipe(&tokens),
        },
        (file, _) => compiled(file.to_owned(), &text(file, read(file)?)?)?,
    };
    Ok(ChatTemplate { template, adds_bos: adds_bos.unwrap_or(true) })
}

/// Reads the texts that no row may contain.
///
/// # Errors
/// When the file cannot be read, or holds no texts.
pub fn read_forbidden(file: &str) -> Result<Forbidden, DataError> {
    Forbidden::read(&read(file)?).map_err(|error| of_place(file.to_owned(), error))
}

/// A file in any folder that can be opened; `None` if it is not there.
///
/// # Errors
/// When the folder cannot be opened, or the file not be read.
pub fn read_named(address: &str) -> Result<Option<Vec<u8>>, DataError> {
    let (folder, name) = folder_and_name(address);
    Folder::open(folder)?.read(name)
}

fn read(address: &str) -> Result<Vec<u8>, DataError> {
    read_named(address)?.ok_or_else(|| DataError::NoFile { file: address.to_owned() })
}

fn text(place: &str, bytes: Vec<u8>) -> Result<String, DataError> {
    String::from_utf8(bytes).map_err(|error| DataError::Format {
        file: place.to_owned(),
        format: "UTF-8",
        reason: error.to_string(),
    })
}

fn of_place(place: String, error: ChatError) -> DataError {
    match error {
        // These say themselves where they are from.
        error @ (ChatError::Template { .. } | ChatError::TokenizerConfig { .. }) => DataError::Chat(error),
        error => DataError::Rows { file: place, error },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::memory;

    fn tokenizer() -> Tokenizer {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tiny/tokenizer.model");
        Tokenizer::read(&std::fs::read(file).unwrap(), "tokenizer.model", None, None).unwrap()
    }

    #[test]
    fn the_tokenizer_s_own_template_comes_before_the_recipe_s() {
        let (folder, tokenizer) = (memory(), tokenizer());
        let read = |choice: &str| read_template(choice, &folder, &tokenizer, None);
        let name = |choice: &str| read(choice).unwrap().template.name().to_owned();
        assert_eq!((name("auto"), read("auto").unwrap().adds_bos), ("recipe".to_owned(), true));
        let config = br#"{"chat_template": "of the config", "add_bos_token": false}"#;
        folder.write("tokenizer_config.json", config.to_vec()).unwrap();
        assert_eq!(
            (name("auto"), read("auto").unwrap().adds_bos),
            ("run:tokenizer_config.json".to_owned(), false)
        );
        folder.write("chat_template.jinja", b"{{ bos_token }}{{ messages }}".to_vec()).unwrap();
        assert_eq!(
            (name("auto"), name("recipe")),
            ("run:chat_template.jinja".to_owned(), "recipe".to_owned())
        );
        assert_eq!(read("auto").unwrap().template.render(&[], false).unwrap().text, "<s>[]");
        folder.write("chat_template.jinja", b"{% if %}".to_vec()).unwrap();
        let message = read("auto").unwrap_err().to_string();
        assert!(message.contains("run:chat_template.jinja cannot be used"), "{message}");
    }

    #[test]
    fn a_file_may_be_named_and_must_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(path("own.jinja"), "own").unwrap();
        std::fs::write(path("texts.txt"), "\n").unwrap();
        let read = |file: &str| read_template(&path(file), &memory(), &tokenizer(), None);
        assert_eq!(read("own.jinja").unwrap().template.source(), "own");
        let message = read("other.jinja").unwrap_err().to_string();
        assert!(message.contains("other.jinja does not exist"), "{message}");
        let message = read_forbidden(&path("texts.txt")).unwrap_err().to_string();
        assert!(message.contains("texts.txt: it holds no texts"), "{message}");
    }
}
