//! What tuning stages read: the base and its tokenizer, rows and the templates that they go through, and adapters. Of the rows, three
//! are shown as they would be trained on, so that a person sees them before anything is spent.

use ulmus_chat::{Rules, Viewer, show_texts};
use ulmus_dataloader::{
    DataError, ExampleFiles, FileGlance, Folder, Glance, PlanTokenizer, preprocessor, read_forbidden,
    renderer, stage_template,
};
use ulmus_evaluator::misfit;
use ulmus_model::AdapterShape;
use ulmus_plan::{ExamplesConfig, Plan, TuneConfig};
use ulmus_types::{Of, counted};

use super::Findings;
use crate::WorkerError;
use crate::jobs::base::{Known, look_for, read_adapter};
use crate::jobs::examples::wrong_rates;
use crate::jobs::subject::must_be;

/// Where the tokenizer of a plan is.
enum Source {
    Found(PlanTokenizer),
    /// The run will train it.
    Later,
    /// It cannot be used, which has been told.
    Wrong,
}

impl Source {
    fn found(&self) -> Option<&PlanTokenizer> {
        match self {
            Self::Found(found) => Some(found),
            Self::Later | Self::Wrong => None,
        }
    }
}

/// Checks the base of a plan and its tuning stages.
pub(super) fn check(plan: &Plan, findings: &mut Findings) {
    let known = plan.base.as_ref().and_then(|base| model(plan, "base.model", &base.model, findings));
    if plan.tune.is_empty() {
        return;
    }
    let place = format!("{}/{}", plan.store.url.trim_end_matches('/'), plan.run.name);
    let run = Folder::find_run(&place).unwrap_or_else(|error| {
        findings.refuse("store.url".to_owned(), &plan.store.url, "the run is kept there", error);
        None
    });
    let source = tokenizer(plan, run.as_ref(), known.as_ref(), findings);
    for (index, config) in plan.tune.iter().enumerate() {
        let stage = Stage { plan, config, at: format!("tune.{index}"), run: run.as_ref(), source: &source };
        stage.check(findings);
    }
}

/// Looks for a model from elsewhere, which must have the shape of the plan's.
fn model(plan: &Plan, key: &str, place: &str, findings: &mut Findings) -> Option<Known> {
    let looked = look_for(place, &plan.store.url).and_then(|known| {
        must_be(&plan.model, &known.shape, place)?;
        Ok(known)
    });
    match looked {
        Ok(known) => {
            findings.say(format!("{key} {place}: there, of the shape of the plan's model"));
            Some(known)
        }
        Err(error) => {
            findings.refuse(key.to_owned(), place, "there must be a model to begin from", error);
            None
        }
    }
}

/// The tokenizer of the run, or the one that the run will take.
fn tokenizer(plan: &Plan, run: Option<&Folder>, base: Option<&Known>, findings: &mut Findings) -> Source {
    let base_model = plan.base.as_ref().map_or("", |base| &base.model[..]);
    let found = match PlanTokenizer::find(plan, run) {
        Ok(Some(found)) => found,
        Ok(None) => return Source::Later,
        Err(error) => {
            // What is wrong with a file that the plan names has been told.
            if plan.tokenizer.file.is_none() {
                findings.refuse("base.model".to_owned(), base_model, "tuning needs a tokenizer", error);
            }
            return Source::Wrong;
        }
    };
    let pieces = counted(found.tokenizer.pieces(), "piece");
    findings.say(format!("tokenizer of the tuning stages {}: {pieces}", found.place));
    let tokens = base.and_then(|known| known.tokens).filter(|_| plan.tokenizer.file.is_none());
    if let Some(reason) = tokens.and_then(|tokens| misfit(&found.tokenizer, &plan.model, tokens)) {
        let rule = "a base comes with its tokenizer";
        let error = format!("{} does not fit: {reason}; name another in tokenizer.file", found.place);
        findings.refuse("base.model".to_owned(), base_model, rule, WorkerError::Plan(error));
    }
    Source::Found(found)
}

/// A tuning stage that is checked.
struct Stage<'a> {
    plan: &'a Plan,
    config: &'a TuneConfig,
    /// Its key in the plan.
    at: String,
    run: Option<&'a Folder>,
    source: &'a Source,
}

impl Stage<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.at)
    }

    fn check(&self, findings: &mut Findings) {
        if let Of::Model(place) = &self.config.of {
            model(self.plan, &self.key("of"), place, findings);
        }
        self.check_adapter(findings);
        if self.check_template(findings) {
            self.check_rows(findings);
        }
    }

    /// The adapter that the stage goes on from.
    fn check_adapter(&self, findings: &mut Findings) {
        let Some(adapter) = &self.config.adapter else { return };
        let Some(from) = &adapter.from else { return };
        let shape = self.plan.shape_of(&self.config.of);
        let read =
            || -> Result<_, WorkerError> { read_adapter(from, &AdapterShape::new(&shape, adapter)?, &shape) };
        match read() {
            Ok(weights) => {
                let parameters = counted(weights.len(), "parameter");
                findings
                    .say(format!("tune {} goes on from {from}, which has {parameters}", self.config.name));
            }
            Err(error) => {
                let rule = "there must be an adapter of this shape for this model";
                findings.refuse(self.key("adapter.from"), from, rule, error);
            }
        }
    }

    /// The template, and the texts that no row may contain. Returns whether rows can be read with them.
    fn check_template(&self, findings: &mut Findings) -> bool {
        let TuneConfig { name, template, decontaminate, .. } = self.config;
        let chat = stage_template(self.config, self.source.found());
        let forbidden = decontaminate.as_ref().map(|file| (file, read_forbidden(file)));
        let is_sound = chat.is_ok() && forbidden.as_ref().is_none_or(|(_, read)| read.is_ok());
        match chat {
            Ok(chat) => findings.say(format!(
                "tune {name} has the chat template {}, for rows that are conversations",
                chat.template.name()
            )),
            Err(error) => {
                findings.refuse(self.key("template"), template, "conversations need a template", error);
            }
        }
        match forbidden {
            None => {}
            Some((file, Ok(texts))) => {
                let texts = counted(texts.count(), "text");
                findings.say(format!("tune {name} leaves out rows with one of the {texts} of {file}"));
            }
            Some((file, Err(error))) => {
                findings.refuse(
                    self.key("decontaminate"),
                    file,
                    "it holds texts that no row may have",
                    error,
                );
            }
        }
        is_sound
    }

    fn check_rows(&self, findings: &mut Findings) {
        let TuneConfig { name, data, eval, .. } = self.config;
        let learned = self.check_sources("data", data, Rules::of_data(self.config), findings);
        self.check_sources("eval", eval, Rules::from(self.config), findings);
        let preferred =
            ExamplesConfig::at(self.config.rso.as_ref().and_then(|rso| rso.reward_head.as_deref()));
        self.check_sources("rso.reward_head", &preferred, Rules::from(self.config), findings);
        let Some((glance, is_whole)) = learned else { return };
        let is_known = is_whole && self.config.rso.is_none();
        if let Some((key, problem)) = wrong_rates(self.config, glance.kept).filter(|_| is_known) {
            let rows = counted(glance.kept, "row");
            findings.refuse(
                self.key(key),
                &rows,
                "each update has a learning rate",
                WorkerError::Plan(problem),
            );
        }
        if !glance.shown.is_empty() {
            let without = match self.source {
                Source::Found(_) => "",
                Source::Later => ", as text without token ids: the run will train its tokenizer",
                Source::Wrong => ", as text without token ids: there is no tokenizer",
            };
            findings.say(format!("tune {name} learns for example{without}:\n{}", glance.shown));
        }
    }

    /// Reads the first rows of some sources. Returns what they hold, and whether these are all rows.
    fn check_sources(
        &self,
        kind: &str,
        sources: &[ExamplesConfig],
        rules: Rules,
        findings: &mut Findings,
    ) -> Option<(Glance, bool)> {
        let is_later = |source: &&ExamplesConfig| self.run.is_none() && source.url.starts_with("run:");
        let (later, there): (Vec<_>, Vec<_>) = sources.iter().partition(is_later);
        let name = &self.config.name;
        for source in &later {
            findings.say(format!("tune {name} {kind}: the run will have made {}", source.url));
        }
        if there.is_empty() {
            return None;
        }
        let there: Vec<ExamplesConfig> = there.into_iter().cloned().collect();
        match self.glance(&there, rules) {
            Ok(glance) => {
                findings.say(format!("tune {name} {kind}: {}", described(&glance)));
                let is_whole = later.is_empty() && glance.is_whole();
                Some((glance, is_whole))
            }
            Err(error) => {
                let urls: Vec<&str> = there.iter().map(|source| &source.url[..]).collect();
                findings.refuse(
                    self.key(kind),
                    &urls.join(", "),
                    "its rows must be such as are learned from",
                    error,
                );
                None
            }
        }
    }

    fn glance(&self, sources: &[ExamplesConfig], rules: Rules) -> Result<Glance, DataError> {
        let files = ExampleFiles::find(sources, &self.plan.data, self.run)?;
        match self.source.found() {
            Some(found) => {
                let viewer = Viewer::new(&found.tokenizer);
                files
                    .glance(&preprocessor(self.config, rules, found)?, |prepared| viewer.show(&prepared.item))
            }
            None => files
                .glance(&renderer(self.config, rules)?, |texts| show_texts(texts, self.config.mask_prompt)),
        }
    }
}

/// What the files of some sources are found to hold: all of them in a line, and each in one of its own.
fn described(glance: &Glance) -> String {
    let rows = |file: &FileGlance| match file.count {
        Some(count) => counted(count, "row"),
        None => format!("more than {}", counted(file.rows, "row")),
    };
    let file =
        |file: &FileGlance| format!("\n  {}: {}, {}, {}", file.file, file.format, rows(file), file.form);
    let files: String = glance.files.iter().map(file).collect();
    let of = if glance.is_whole() { "of" } else { "of the first" };
    let (kept, rows, count) = (glance.kept, counted(glance.rows, "row"), counted(glance.files.len(), "file"));
    let dropped = match &glance.dropped_for_people()[..] {
        "" => String::new(),
        dropped => format!("; left out: {dropped}"),
    };
    format!("{kept} {of} {rows} in {count} are kept{dropped}{files}")
}
