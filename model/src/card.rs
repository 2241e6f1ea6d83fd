//! Model cards: the `README.md` of a model folder, as the hub shows it.
//!
//! A card is a function of [`ModelCard`]: what is not known is left out or said to be unknown, never guessed. What is measured of a
//! model, a run adds when it ends.

use std::fmt::Write as _;

use ulmus_plan::{ModelConfig, NormKind};
use ulmus_types::counted;

/// What a card says of a model.
#[derive(Debug, Clone)]
pub struct ModelCard<'a> {
    /// Name of the model.
    pub name: &'a str,
    /// Its shape.
    pub config: &'a ModelConfig,
    /// The model that training began from: a name on the hub, or any other address.
    pub base: Option<&'a str>,
    /// Identifier of the licence of the weights, as the hub knows it.
    pub licence: Option<&'a str>,
    /// How it was trained, in sentences, one for each fact.
    pub training: Vec<String>,
    /// What it was trained on.
    pub data: Vec<CardData>,
    /// Whether the tokenizer has a chat template.
    pub chats: bool,
}

/// Data that a model was trained on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardData {
    /// Address of the data, or its name where nobody else can reach it: `hf://datasets/ORG/NAME` is linked as a data set of
    /// the hub.
    pub address: String,
    /// How much of it there is, or was used, with its unit.
    pub amount: String,
    /// A hash, and of what.
    pub hash: String,
}

impl CardData {
    /// The name of the data set on the hub, if it is there.
    fn on_hub(&self) -> Option<String> {
        let path = self.address.strip_prefix("hf://datasets/")?;
        let mut parts = path.split('/');
        let (organisation, name) = (parts.next()?, parts.next()?.split('@').next()?);
        Some(format!("{organisation}/{name}"))
    }
}

impl ModelCard<'_> {
    /// The text of the card.
    pub fn to_markdown(&self) -> String {
        let sections = [self.header(), self.description(), self.usage(), self.training(), self.licence()];
        sections.into_iter().filter(|section| !section.is_empty()).collect::<Vec<_>>().join("\n")
    }

    /// What programs read, in YAML. A JSON string is one of YAML.
    fn header(&self) -> String {
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let mut lines = vec![format!("license: {}", quoted(self.licence.unwrap_or("unknown")))];
        // Of another one, the hub would take the name for that of a stranger's.
        let base = self.base.and_then(|base| base.strip_prefix("hf://"));
        lines.extend(base.map(|base| format!("base_model: {}", quoted(base))));
        let mut data: Vec<String> = self.data.iter().filter_map(CardData::on_hub).collect();
        data.sort();
        data.dedup();
        if !data.is_empty() {
            lines.push("datasets:".to_owned());
            lines.extend(data.iter().map(|name| format!("- {}", quoted(name))));
        }
        lines.push(
            "library_name: transformers\npipeline_tag: text-generation\ntags:\n- openelm\n- ulmus".to_owned(),
        );
        format!("---\n{}\n---\n", lines.join("\n"))
    }

    fn description(&self) -> String {
        let Self { name, config, .. } = self;
        let layers = config.layers();
        let span = |width: fn(&ulmus_plan::LayerDims) -> usize| {
            let (least, most) = (layers.iter().map(width).min(), layers.iter().map(width).max());
            let (least, most) = (least.unwrap_or_default(), most.unwrap_or_default());
            if least == most { least.to_string() } else { format!("{least} to {most}") }
        };
        let norm = match config.norm {
            NormKind::Rms | NormKind::NaiveRms => "RMS norm",
            NormKind::Layer => "layer norm",
        };
        format!(
            "# {name}\n\nAn OpenELM ([arXiv 2404.14619](https://arxiv.org/abs/2404.14619)) of {} parameters: {} of \
             width {}, with {} query heads of width {} and an FFN of {} in each, {norm}, a vocabulary of {} and a context \
             of {} tokens. Made with Ulmus.\n",
            config.parameters(),
            counted(config.num_transformer_layers as u64, "layer"),
            config.model_dim,
            span(|layer| layer.q_heads),
            config.head_dim,
            span(|layer| layer.ffn_dim),
            config.vocab_size,
            config.max_context_length,
        )
    }

    fn usage(&self) -> String {
        let text = if self.chats {
            "messages = [{\"role\": \"user\", \"content\": \"Hello!\"}]\n\
             ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors=\"pt\", \
             return_dict=True)\n"
        } else {
            "ids = tokenizer(\"Hello\", return_tensors=\"pt\")\n"
        };
        format!(
            "## How to use it\n\nThe folder has the code of the model, `modeling_openelm.py`, which transformers runs only if it \
             is trusted:\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)\n\
             model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)\n\
             {text}made = model.generate(ids[\"input_ids\"], attention_mask=ids[\"attention_mask\"], max_new_tokens=64)\n\
             print(tokenizer.decode(made[0], skip_special_tokens=True))\n```\n"
        )
    }

    fn training(&self) -> String {
        let mut text = String::from("## Training\n\n");
        let base = self.base.map(|base| format!("It began from {base}."));
        for fact in base.iter().chain(&self.training) {
            writeln!(text, "- {fact}").expect("a text can be written to");
        }
        let rows = self.data.iter().map(|data| vec![&data.address[..], &data.amount, &data.hash]);
        let data = table("Data", &["address", "amount", "hash"], rows);
        if !data.is_empty() {
            text.push('\n');
            text.push_str(&data);
        }
        text
    }

    fn licence(&self) -> String {
        let said = match self.licence {
            Some(licence) => format!("The weights are under {licence}."),
            None => "The licence of the weights was not stated. It may follow from that of the data and of the base; state it \
                     before you publish them."
                .to_owned(),
        };
        format!("## Licence\n\n{said} `modeling_openelm.py` is under Apache-2.0.\n")
    }
}

/// A section with a table, or nothing without rows.
fn table<'a>(title: &str, header: &[&str], rows: impl Iterator<Item = Vec<&'a str>>) -> String {
    let line = |cells: &[&str]| {
        let cells = cells.iter().map(|cell| cell.replace('|', "\\|").replace('\n', " "));
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let rows: String = rows.map(|row| line(&row)).collect();
    if rows.is_empty() {
        return rows;
    }
    format!("## {title}\n\n{}|{}\n{rows}", line(header), "---|".repeat(header.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ulmus_plan::Preset;

    fn card(config: &ModelConfig) -> ModelCard<'_> {
        ModelCard {
            name: "small: model",
            config,
            base: Some("hf://apple/OpenELM-270M"),
            licence: None,
            training: vec!["It has seen 12 tokens.".to_owned()],
            data: vec![
                CardData {
                    address: "hf://datasets/a/b@v1/c".into(),
                    amount: "3 rows".into(),
                    hash: "12|34".into(),
                },
                CardData { address: "/texts".into(), amount: "1 byte".into(), hash: "56".into() },
            ],
            chats: true,
        }
    }

    #[test]
    fn a_card_says_what_is_known() {
        let config = Preset::Openelm270m.config();
        let text = card(&config).to_markdown();
        let (header, rest) = text.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap();
        let lines: Vec<&str> = header.lines().collect();
        assert_eq!(
            lines[..4],
            ["license: \"unknown\"", "base_model: \"apple/OpenELM-270M\"", "datasets:", "- \"a/b\""]
        );
        for said in [
            "# small: model\n",
            "of 271691008 parameters: 16 layers of width 1280, with 12 to 20 query heads of width 64",
            "apply_chat_template",
            "- It began from hf://apple/OpenELM-270M.\n- It has seen 12 tokens.\n",
            "| hf://datasets/a/b@v1/c | 3 rows | 12\\|34 |\n| /texts | 1 byte | 56 |\n",
            "was not stated",
        ] {
            assert!(rest.contains(said), "{said} in {rest}");
        }
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let config = Preset::Openelm270m.config();
        let bare =
            ModelCard { base: None, data: Vec::new(), licence: Some("mit"), chats: false, ..card(&config) };
        let text = bare.to_markdown();
        for absent in ["base_model", "datasets", "## Data", "apply_chat_template", "not stated"] {
            assert!(!text.contains(absent), "{absent} in {text}");
        }
        assert!(text.contains("license: \"mit\"\nlibrary_name"));
    }
}
