//! What is wrong with a value that cannot be read, in the words of a plan instead of the library's that reads it.

use toml::Value;

/// The rule that a value breaks, and the next thing to do. `told` is what serde or one of our types says about it, and `usual`
/// what a plan has there by default.
pub(crate) fn in_words(told: &str, key: &str, value: &Value, usual: Option<&Value>) -> (String, String) {
    let for_instance = |or: &str| match usual {
        Some(usual) => format!("write for instance {usual}"),
        None => format!("write for instance {or}"),
    };
    let Some((_, expected)) = told.rsplit_once(", expected ") else {
        // Our own types say the rule, and most of them the advice.
        return match told.split_once("; ") {
            Some((rule, advice)) => (rule.to_owned(), advice.to_owned()),
            None => (told.to_owned(), for_instance("another value")),
        };
    };
    let choices: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    if !choices.is_empty() {
        return choice(&choices, value.as_str().unwrap_or_default());
    }
    let bare = value.as_str().map(str::trim);
    let (rule, advice) = match expected {
        "u64" | "usize" => (
            "it must be a whole number",
            match (bare.filter(|text| text.parse::<u64>().is_ok()), value.as_float()) {
                (Some(number), _) => format!("write {number} without quotes"),
                (_, Some(float)) if float >= 0.0 && float.fract() == 0.0 => format!("write {float}"),
                _ => for_instance("1"),
            },
        ),
        "f64" => (
            "it must be a number",
            match bare.filter(|text| text.parse::<f64>().is_ok()) {
                Some(number) => format!("write {number} without quotes"),
                None => for_instance("0.5"),
            },
        ),
        "a boolean" => ("it must be true or false", "write true or false, without quotes".to_owned()),
        "a duration" => (
            "it must be a time",
            match value.as_integer().or_else(|| bare?.parse().ok()).filter(|seconds| *seconds >= 0) {
                Some(seconds) => format!("write \"{seconds}s\" for seconds"),
                None => for_instance("\"30s\""),
            },
        ),
        "a string" => ("it must be text", "write one text, in quotes".to_owned()),
        "a sequence" => (
            "it must be a list",
            match value {
                Value::Table(_) => format!("write [[{key}]], in two brackets, above the keys of each entry"),
                _ => format!("write [{value}]"),
            },
        ),
        // The one list of a fixed length.
        "an array of length 2" | "fewer elements in array" => {
            ("it must be a list of two whole numbers", for_instance("[0, 100]"))
        }
        _ => ("it must be a table", format!("write [{key}], and its keys on the lines below")),
    };
    (rule.to_owned(), advice)
}

/// What is wrong with a name that is none of `choices`.
pub(crate) fn choice(choices: &[&str], written: &str) -> (String, String) {
    let quoted: Vec<String> = choices.iter().map(|choice| format!("{choice:?}")).collect();
    let rule = match quoted.split_last() {
        Some((last, others)) if !others.is_empty() => format!("it must be {} or {last}", others.join(", ")),
        _ => format!("it must be {}", quoted.join("")),
    };
    let nearest = choices.iter().map(|choice| (strsim::jaro_winkler(choice, written), choice));
    let nearest = nearest.filter(|(likeness, _)| *likeness > 0.75).max_by(|a, b| a.0.total_cmp(&b.0));
    let advice = match nearest {
        Some((_, choice)) => format!("did you mean {choice:?}?"),
        None => "write one of these".to_owned(),
    };
    (rule, advice)
}

/// What is wrong with a line that is not TOML, and the next thing to do; `told` is what the library says.
pub(crate) fn not_toml(told: &str) -> (String, String) {
    if told.contains("invalid type: integer") || told.contains("overflow") {
        return (out_of_bounds(), "write one in that range".to_owned());
    }
    if told.contains("string values must be quoted") {
        let advice = "write text in quotes, and something behind every =";
        return (
            "this is not TOML: a value is neither a number nor text in quotes".to_owned(),
            advice.to_owned(),
        );
    }
    (format!("this is not TOML: {told}"), "correct the line".to_owned())
}

/// The rule for whole numbers that TOML has no room for.
pub(crate) fn out_of_bounds() -> String {
    format!("a whole number must be from {} to {}", i64::MIN, i64::MAX)
}
