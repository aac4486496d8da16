//! Faults put into a run: it must go back, skip, halve the rate and carry on to a normal loss.

mod common;

use candle_core::{Device, Tensor};
use common::*;
use titanbit::data::{Mixture, TokenSet};
use titanbit::train::checkpoint::{self, CheckpointDir};
use titanbit::train::{Anomaly, StepOutcome, Trainer};

fn take_steps(trainer: &mut Trainer, until: u64) -> f64 {
    let mut last = f64::NAN;
    while trainer.step_count() < until {
        match trainer.step().unwrap() {
            StepOutcome::Applied { loss, .. } => last = loss,
            other => panic!("unexpected {other:?}"),
        }
        if trainer.step_count().is_multiple_of(10) {
            trainer.save().unwrap();
        }
    }
    last
}

/// Multiplies the weight called `name` where it is.
fn scale_weight(trainer: &Trainer, name: &str, factor: f64) {
    let parameters = trainer.model().parameters();
    let parameter = parameters.iter().find(|p| p.name == name).unwrap();
    let scaled = (parameter.var.as_detached_tensor() * factor).unwrap();
    parameter.var.set(&scaled).unwrap();
}

fn new_trainer(dir: &std::path::Path, overrides: &[&str]) -> Trainer {
    Trainer::new(&load_config(dir, overrides), &dir.join("run"), &Device::Cpu).unwrap()
}

/// Trains to step 55, breaks something, and expects the way back and a healthy end.
fn recovers_from(fault: impl Fn(&Trainer), expected: impl Fn(&Anomaly) -> bool) {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = new_trainer(dir.path(), &[]);
    let before = take_steps(&mut trainer, 55);
    fault(&trainer);
    let StepOutcome::RolledBack {
        anomaly,
        failed_step,
        step,
        skipped,
        lr_scale,
    } = trainer.step().unwrap()
    else {
        panic!("the fault went unnoticed");
    };
    assert!(expected(&anomaly), "{anomaly:?}");
    assert_eq!(failed_step, 56);
    // Settling takes 20 steps: step 30 is the newest checkpoint that outlived it.
    assert_eq!((step, trainer.step_count()), (30, 30));
    assert_eq!(skipped, 55 * 8..56 * 8);
    assert_eq!(lr_scale, 0.5);
    let StepOutcome::Applied { lr, .. } = trainer.step().unwrap() else {
        panic!("a second rollback");
    };
    assert_eq!(lr, 0.005);
    let after = take_steps(&mut trainer, 110);
    assert!(
        after < before && after < 0.3,
        "loss {before} before, {after} after"
    );
}

#[test]
fn a_nan_loss_rolls_back() {
    let poison = |trainer: &Trainer| {
        scale_weight(trainer, "model.layers.1.mlp.up_proj.weight", f64::NAN);
    };
    recovers_from(poison, |anomaly| *anomaly == Anomaly::NonFiniteLoss);
}

/// The final norm grows and the head shrinks by the same factor: the loss stays as it was, the
/// head's gradient overflows.
#[test]
fn an_exploding_gradient_rolls_back() {
    let explode = |trainer: &Trainer| {
        scale_weight(trainer, "model.norm.weight", 1e25);
        scale_weight(trainer, "lm_head.weight", 1e-25);
    };
    recovers_from(explode, |anomaly| *anomaly == Anomaly::NonFiniteGradient);
}

#[test]
fn a_large_finite_gradient_is_clipped_and_trained_through() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = new_trainer(dir.path(), &[]);
    take_steps(&mut trainer, 30);
    scale_weight(&trainer, "model.norm.weight", 1e3);
    scale_weight(&trainer, "lm_head.weight", 1e-3);
    let StepOutcome::Applied { grad_norm, .. } = trainer.step().unwrap() else {
        panic!("rolled back");
    };
    assert!(grad_norm > 10.0, "{grad_norm}");
}

#[test]
fn a_broken_model_spikes() {
    let wreck = |trainer: &Trainer| scale_weight(trainer, "lm_head.weight", -30.0);
    recovers_from(wreck, |anomaly| matches!(anomaly, Anomaly::Spike { .. }));
}

#[test]
fn before_any_stable_checkpoint_the_run_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = new_trainer(dir.path(), &[]);
    take_steps(&mut trainer, 15);
    scale_weight(&trainer, "lm_head.weight", f64::NAN);
    let StepOutcome::RolledBack { step, .. } = trainer.step().unwrap() else {
        panic!("the fault went unnoticed");
    };
    assert_eq!(step, 0);
    // The unstable checkpoint of step 10 is gone: resuming would bring the fault back.
    assert!(!dir.path().join("run/checkpoints/step_0000010").exists());
    assert!(take_steps(&mut trainer, 100) < 0.3);
}

/// One window of tokens that occur nowhere else, met late in the first epoch.
#[test]
fn a_poisoned_window_is_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let config = load_config(dir.path(), &["train.steps=125"]);
    let path = dir.path().join("train.bin");
    let met_at = 8 * 80 + 3;
    let window = {
        let set = TokenSet::open(&[&path], None).unwrap();
        let mixture = Mixture::new(vec![(set, 1.0)], 16, 64, config.train.seed).unwrap();
        mixture.window(met_at).window as usize
    };
    let mut tokens = counting(16 * 1000 + 1);
    for (i, token) in tokens[window * 16..][..17].iter_mut().enumerate() {
        *token = 50 + ((i * 5) % 14) as u16;
    }
    write_bin(&path, &tokens);

    let mut trainer = Trainer::new(&config, &dir.path().join("run"), &Device::Cpu).unwrap();
    let mut rollbacks = Vec::new();
    let mut last = f64::NAN;
    while trainer.step_count() < 120 {
        match trainer.step().unwrap() {
            StepOutcome::Applied { loss, .. } => last = loss,
            StepOutcome::RolledBack {
                skipped,
                failed_step,
                ..
            } => {
                rollbacks.push((skipped, failed_step));
                continue;
            }
        }
        if trainer.step_count().is_multiple_of(10) {
            trainer.save().unwrap();
        }
    }
    assert_eq!(rollbacks, [(640..648, 81)]);
    assert!(last < 0.3, "{last}");
}

#[test]
fn rollbacks_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = new_trainer(dir.path(), &["stability.max_rollbacks=2"]);
    let mut outcome = Ok(());
    for _ in 0..3 {
        scale_weight(&trainer, "lm_head.weight", f64::NAN);
        outcome = trainer.step().map(|_| ());
    }
    let message = outcome.unwrap_err().to_string();
    assert!(
        message.contains("after 2 rollbacks") && message.contains("raise stability.max_rollbacks"),
        "{message}"
    );
}

/// A planned drop of the rate restarts the average, so that what follows is no spike.
#[test]
fn the_two_stage_jump_is_no_spike() {
    let dir = tempfile::tempdir().unwrap();
    let overrides = ["schedule.kind=two_stage", "schedule.stage2_lr=0.001"];
    let mut trainer = new_trainer(dir.path(), &overrides);
    take_steps(&mut trainer, 60);
    // Worse by far more than the threshold, but at the midpoint.
    scale_weight(&trainer, "lm_head.weight", -30.0);
    let ids = Tensor::new(&[[0u32, 1, 2]], &Device::Cpu).unwrap();
    let loss = trainer.model().loss(&ids, &ids).unwrap();
    assert!(loss > 10.0);
    assert!(matches!(
        trainer.step().unwrap(),
        StepOutcome::Applied { .. }
    ));
}

/// A run forked from another's checkpoint never falls back to fresh weights.
#[test]
fn a_fork_rolls_back_to_where_it_began() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = new_trainer(dir.path(), &[]);
    take_steps(&mut trainer, 20);
    let from = dir.path().join("run/checkpoints/step_0000020");
    let mut state = checkpoint::verify(&from).unwrap();
    state.progress.stability.origin = 20;
    let config = load_config(dir.path(), &[]);
    let out = dir.path().join("fork");
    let mut fork = Trainer::resume(&config, &out, &Device::Cpu, &from, state).unwrap();
    fork.save().unwrap();
    let before = take_steps(&mut fork, 35);
    scale_weight(&fork, "lm_head.weight", f64::NAN);
    let StepOutcome::RolledBack { step, .. } = fork.step().unwrap() else {
        panic!("the fault went unnoticed");
    };
    assert_eq!(step, 20);
    assert!(take_steps(&mut fork, 40) < 1.2 * before);
}

/// Kept are the newest, every so many, the best, and those that a rollback needs or will need.
#[test]
fn pruning_spares_what_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let overrides = ["checkpoint.keep_last=1", "checkpoint.keep_every=40"];
    let mut trainer = new_trainer(dir.path(), &overrides);
    let checkpoints = CheckpointDir::new(&dir.path().join("run"));
    let best = || std::fs::read_to_string(dir.path().join("run/checkpoints/best"));
    take_steps(&mut trainer, 9);
    assert!(best().is_err(), "nothing was validated");
    assert!(matches!(
        trainer.step().unwrap(),
        StepOutcome::Applied { .. }
    ));
    trainer.validate(|| false).unwrap();
    trainer.save().unwrap();
    assert_eq!(best().unwrap(), "step_0000010");
    take_steps(&mut trainer, 70);
    let steps: Vec<u64> = checkpoints
        .list()
        .unwrap()
        .into_iter()
        .map(|c| c.0)
        .collect();
    // 50 has outlived the settling window of 20 steps, 60 is in it.
    assert_eq!(steps, [10, 40, 50, 60, 70]);
    // The weights of step 10 are the ones whose validation is known.
    assert_eq!(best().unwrap(), "step_0000010");
}
