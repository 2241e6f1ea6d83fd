//! The run folder is an interface between versions: this version finishes a run of an earlier one with the same bits.

use std::fs;
use std::path::Path;

use ulmus_tests::Sandbox;

#[test]
fn a_run_of_an_earlier_version_goes_on_to_the_bits_of_a_new_one() {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/old-run");

    let old = Sandbox::with_contents_of(&kept);
    let before = old.run("old").steps_so_far();
    assert!((20..60).contains(&before), "it was stopped halfway, after {before} steps");
    let said = old.coordinator(&[]).succeeds();
    assert!(said.contains(&format!("trains from step {before} of 60")), "{said}");
    assert!(!said.contains("prepare on"), "the text is prepared already: {said}");

    let new = Sandbox::with_contents_of(&kept);
    fs::remove_dir_all(new.path("runs")).expect("it can be deleted");
    new.coordinator(&[]).succeeds();
    old.run("old").bits().assert_equal(&new.run("old").bits());

    // Later versions also recognize a finished run: they print its summary again and do nothing else.
    let again = old.coordinator(&[]).succeeds();
    assert!(!again.contains(" joined") && again.contains("held-out perplexity"), "{again}");
}
