//! `docs/plan.md` has every key of the plan, with its description and default from the plan crate.
//!
//!     ULMUS_WRITE_DOCS=1 cargo test --workspace --test plan_page      # rewrites the page

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use syn::{Attribute, Expr, ExprLit, Fields, Item, Lit, Meta, Type};
use ulmus_plan::{
    AdapterConfig, BaseConfig, BenchConfig, EvaluationConfig, ExamplesConfig, ExportConfig, MAY_CHANGE, Plan,
    PrepareConfig, RsoConfig, SourceConfig, TuneConfig,
};
use ulmus_tests::repository;

/// The generated part of the page is between these lines.
const BEGIN: &str = "<!-- Generated from the plan crate; see tests/tests/plan_page.rs. -->\n";
const END: &str = "<!-- End of the generated part. -->\n";

/// A field of a struct, or a variant of an enum: its name in plans, its type and its description.
struct Part {
    name: String,
    kind: String,
    description: String,
}

/// Structs and enums of the plan crate, by name.
fn definitions() -> BTreeMap<String, Vec<Part>> {
    let mut definitions = BTreeMap::new();
    for entry in fs::read_dir(repository().join("proto/plan/src")).unwrap().map(Result::unwrap) {
        let file = syn::parse_file(&fs::read_to_string(entry.path()).unwrap()).unwrap();
        for item in file.items {
            match item {
                Item::Struct(item) => {
                    let Fields::Named(fields) = item.fields else { continue };
                    let parts = fields.named.into_iter().map(|field| Part {
                        name: field.ident.unwrap().to_string(),
                        kind: innermost(&field.ty),
                        description: description(&field.attrs),
                    });
                    definitions.insert(item.ident.to_string(), parts.collect());
                }
                Item::Enum(item) if item.variants.iter().all(|variant| variant.fields.is_empty()) => {
                    let parts = item.variants.into_iter().map(|variant| Part {
                        name: renamed(&variant.attrs)
                            .unwrap_or_else(|| snake_case(&variant.ident.to_string())),
                        kind: String::new(),
                        description: description(&variant.attrs),
                    });
                    definitions.insert(item.ident.to_string(), parts.collect());
                }
                _ => {}
            }
        }
    }
    definitions
}

/// The last name of a type, or that of the inner type of an `Option` or a `Vec`.
fn innermost(ty: &Type) -> String {
    let Type::Path(path) = ty else { return String::new() };
    let last = path.path.segments.last().unwrap();
    match &last.arguments {
        syn::PathArguments::AngleBracketed(arguments) => match arguments.args.first() {
            Some(syn::GenericArgument::Type(inner)) => innermost(inner),
            _ => last.ident.to_string(),
        },
        _ => last.ident.to_string(),
    }
}

/// The first paragraph of a doc comment, on one line.
fn description(attributes: &[Attribute]) -> String {
    let lines = attributes.iter().filter_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("doc") => match &pair.value {
            Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) => Some(text.value().trim().to_owned()),
            _ => None,
        },
        _ => None,
    });
    lines.take_while(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// The name that serde uses.
fn renamed(attributes: &[Attribute]) -> Option<String> {
    let mut name = None;
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("serde")) {
        attribute
            .parse_nested_meta(|meta| {
                if meta.path.is_ident("rename") {
                    name = Some(meta.value()?.parse::<syn::LitStr>()?.value());
                }
                Ok(())
            })
            .unwrap();
    }
    name
}

fn snake_case(name: &str) -> String {
    let mut snake = String::new();
    for (index, letter) in name.char_indices() {
        if letter.is_uppercase() && index > 0 {
            snake.push('_');
        }
        snake.extend(letter.to_lowercase());
    }
    snake
}

fn page() -> String {
    let definitions = definitions();
    let mut defaults = toml::Table::try_from(Plan::default()).unwrap();
    defaults.insert("prepare".into(), toml::Value::try_from(PrepareConfig::default()).unwrap());
    let source = toml::Table::try_from(SourceConfig::default()).unwrap();
    let mut page = String::new();
    defaults.insert("evaluation".into(), toml::Value::try_from(EvaluationConfig::default()).unwrap());
    defaults.insert("export".into(), toml::Value::try_from(ExportConfig::default()).unwrap());
    defaults.insert("bench".into(), toml::Value::try_from(BenchConfig::default()).unwrap());
    defaults.insert("base".into(), toml::Value::try_from(BaseConfig::default()).unwrap());
    defaults.insert("tune".into(), toml::Value::try_from(TuneConfig::default()).unwrap());
    let examples = toml::Table::try_from(ExamplesConfig::default()).unwrap();
    let adapter = toml::Table::try_from(AdapterConfig::default()).unwrap();
    let rso = toml::Table::try_from(RsoConfig::default()).unwrap();
    for section in &definitions["Plan"] {
        let values = defaults[&section.name].as_table().unwrap();
        let heading = match &section.name[..] {
            stages @ ("evaluation" | "export" | "bench" | "tune") => format!("[[{stages}]]"),
            section => format!("[{section}]"),
        };
        table(&mut page, &heading, section, values, &definitions);
        for part in definitions[&section.kind].iter().filter(|part| definitions.contains_key(&part.kind)) {
            // Defaults of sources are meaningless: they are empty values of keys that a source needs.
            let (values, is_list) = match &part.kind[..] {
                "SourceConfig" => (&source, true),
                "ExamplesConfig" => (&examples, true),
                "AdapterConfig" => (&adapter, false),
                "RsoConfig" => (&rso, false),
                _ => continue,
            };
            let name = format!("[{}.{}]", section.name, part.name);
            let heading = if is_list { format!("[{name}]") } else { name };
            table(&mut page, &heading, part, values, &definitions);
        }
    }
    let keys = MAY_CHANGE.map(|key| format!("`{}`", key.trim_end_matches('.')));
    let (last, others) = keys.split_last().unwrap();
    writeln!(
        page,
        "## What may change later\n\nOnce a run has begun, only these keys and tables may change: {} and {last}. For any other key \
         the coordinator lists what differs and stops; give the run another name.\n",
        others.join(", ")
    )
    .unwrap();
    page
}

fn table(
    page: &mut String,
    heading: &str,
    section: &Part,
    values: &toml::Table,
    definitions: &BTreeMap<String, Vec<Part>>,
) {
    writeln!(page, "## `{heading}`\n\n{}\n\n| key | default | meaning |\n|---|---|---|", section.description)
        .unwrap();
    for part in &definitions[&section.kind] {
        if ["SourceConfig", "ExamplesConfig", "AdapterConfig", "RsoConfig"].contains(&part.kind.as_str()) {
            continue;
        }
        let default = match values.get(&part.name) {
            None => "none".to_owned(),
            // Where a key is not always required, its description says when.
            Some(toml::Value::String(text)) if text.is_empty() => {
                let says_when = part.description.contains("required for");
                if says_when { "none".to_owned() } else { "required".to_owned() }
            }
            Some(toml::Value::Array(items)) if items.is_empty() => {
                let is_required = part.description.contains("at least one");
                if is_required { "required".to_owned() } else { "`[]`".to_owned() }
            }
            Some(value) => format!("`{value}`"),
        };
        let mut meaning = part.description.clone();
        for variant in definitions.get(&part.kind).into_iter().flatten() {
            write!(meaning, "<br>`{}`: {}", variant.name, variant.description).unwrap();
        }
        writeln!(page, "| `{}` | {default} | {meaning} |", part.name).unwrap();
    }
    page.push('\n');
}

#[test]
fn the_page_of_the_plan_has_every_key() {
    let path = repository().join("docs/plan.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (there, after) = rest.split_once(END).unwrap();
    let page = format!("\n{}", page());
    if std::env::var_os("ULMUS_WRITE_DOCS").is_some() {
        fs::write(&path, [before, BEGIN, &page, END, after].concat()).unwrap();
    } else {
        let advice = "ULMUS_WRITE_DOCS=1 cargo test --workspace --test plan_page";
        assert!(there == page, "docs/plan.md differs from the plan crate; rewrite it: {advice}");
    }
}
