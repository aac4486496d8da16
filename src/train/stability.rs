//! Telling a spike from a step, and what to do after one: the bookkeeping of rollbacks, skipped
//! data and the reduced learning rate. Clipping is the optimizer's; loading the checkpoint is
//! the trainer's.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::config::Stability;

/// Why a step must not be applied.
#[derive(Clone, Debug, PartialEq)]
pub enum Anomaly {
    NonFiniteLoss,
    NonFiniteGradient,
    /// Loss, and the moving average it exceeds.
    Spike {
        loss: f64,
        ema: f64,
    },
}

impl std::fmt::Display for Anomaly {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::NonFiniteLoss => write!(f, "loss is not finite"),
            Self::NonFiniteGradient => write!(f, "gradient norm is not finite"),
            Self::Spike { loss, ema } => {
                write!(f, "loss {loss:.3} spiked above its average {ema:.3}")
            }
        }
    }
}

/// What is remembered across steps and checkpoints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StabilityState {
    /// Bias-corrected moving average of the loss: the raw sum and its total weight.
    ema_sum: f64,
    ema_weight: f64,
    ema_steps: u64,
    pub rollbacks: u32,
    /// Sample ranges that spiked and are not to be seen again.
    pub skipped: Vec<Range<u64>>,
    /// Step from which the learning rate eases back, and the factor it starts from.
    recovery: Option<(u64, f64)>,
    /// Step the run began at: above 0 when it was forked from another's checkpoint.
    #[serde(default)]
    pub origin: u64,
}

/// Watches every step of a run.
#[derive(Clone, Debug)]
pub struct Monitor {
    config: Stability,
    pub state: StabilityState,
}

impl Monitor {
    pub fn new(config: Stability, state: StabilityState) -> Self {
        Self { config, state }
    }

    /// Judges a step before it is applied; a healthy loss enters the average.
    pub fn observe(&mut self, loss: f64, grad_norm: f64) -> Result<(), Anomaly> {
        if !loss.is_finite() {
            return Err(Anomaly::NonFiniteLoss);
        }
        if !grad_norm.is_finite() {
            return Err(Anomaly::NonFiniteGradient);
        }
        if let Some(ema) = self.ema()
            && self.state.ema_steps >= self.config.ema_warmup
            && loss > self.config.spike_threshold * ema
        {
            return Err(Anomaly::Spike { loss, ema });
        }
        let decay = self.config.ema_decay;
        self.state.ema_sum = decay * self.state.ema_sum + (1.0 - decay) * loss;
        self.state.ema_weight = decay * self.state.ema_weight + (1.0 - decay);
        self.state.ema_steps += 1;
        Ok(())
    }

    /// Moving average of the loss, once there is one.
    pub fn ema(&self) -> Option<f64> {
        (self.state.ema_steps > 0).then(|| self.state.ema_sum / self.state.ema_weight)
    }

    /// Forgets the average: the plan changes here, and the loss may jump.
    pub fn restart_ema(&mut self) {
        self.state.ema_sum = 0.0;
        self.state.ema_weight = 0.0;
        self.state.ema_steps = 0;
    }

    /// Factor on the planned learning rate: `lr_factor` after a rollback, linearly back to 1.
    pub fn lr_scale(&self, step: u64) -> f64 {
        match self.state.recovery {
            Some((start, factor)) if step.saturating_sub(start) < self.config.recovery_steps => {
                let eased = step.saturating_sub(start) as f64 / self.config.recovery_steps as f64;
                factor + (1.0 - factor) * eased
            }
            _ => 1.0,
        }
    }

    pub fn may_roll_back(&self) -> bool {
        self.state.rollbacks < self.config.max_rollbacks
    }

    /// The state to go on with from a checkpoint at `step` whose own state is `restored`: the
    /// average is the checkpoint's, the count of rollbacks and the skipped data are today's.
    pub fn after_rollback(
        &self,
        restored: StabilityState,
        step: u64,
        failed_step: u64,
        window: Range<u64>,
    ) -> StabilityState {
        let mut skipped = self.state.skipped.clone();
        skipped.push(window);
        let factor = self.lr_scale(failed_step) * self.config.lr_factor;
        StabilityState {
            rollbacks: self.state.rollbacks + 1,
            skipped,
            recovery: Some((step, factor)),
            ..restored
        }
    }

    /// Whether a rollback at `now` may go back to a checkpoint of step `saved`: it has outlived the
    /// settling window, or it is where the run began.
    pub fn is_stable(&self, saved: u64, now: u64) -> bool {
        let settled = now
            .checked_sub(saved)
            .is_some_and(|age| age >= self.config.settle_steps);
        settled || saved == self.state.origin
    }
}

impl StabilityState {
    /// The first sample at or after `position` from which `samples` in a row touch no skipped
    /// range.
    pub fn next_position(&self, mut position: u64, samples: u64) -> u64 {
        while let Some(hit) = self
            .skipped
            .iter()
            .find(|range| range.start < position + samples && position < range.end)
        {
            position = hit.end;
        }
        position
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor() -> Monitor {
        let config = Stability {
            ema_warmup: 3,
            ema_decay: 0.9,
            recovery_steps: 10,
            settle_steps: 5,
            max_rollbacks: 2,
            ..Stability::default()
        };
        Monitor::new(config, StabilityState::default())
    }

    #[test]
    fn spikes_are_told_only_after_warm_up_and_do_not_enter_the_average() {
        let mut monitor = monitor();
        // Far above the average of one step, but the average is too young to judge.
        monitor.observe(1.0, 1.0).unwrap();
        monitor.observe(9.0, 1.0).unwrap();
        monitor.restart_ema();
        for _ in 0..3 {
            monitor.observe(2.0, 1.0).unwrap();
        }
        assert!((monitor.ema().unwrap() - 2.0).abs() < 1e-12);
        monitor.observe(9.9, 1.0).unwrap();
        let before = monitor.state.clone();
        let ema = monitor.ema().unwrap();
        let spike = monitor.observe(5.1 * ema, 1.0);
        assert!(matches!(spike, Err(Anomaly::Spike { .. })));
        assert_eq!(monitor.state, before);
    }

    #[test]
    fn non_finite_values_are_anomalies_from_the_first_step() {
        let mut monitor = monitor();
        assert_eq!(monitor.observe(f64::NAN, 1.0), Err(Anomaly::NonFiniteLoss));
        assert_eq!(
            monitor.observe(f64::INFINITY, 1.0),
            Err(Anomaly::NonFiniteLoss)
        );
        assert_eq!(
            monitor.observe(1.0, f64::INFINITY),
            Err(Anomaly::NonFiniteGradient)
        );
        assert_eq!(
            monitor.observe(1.0, f64::NAN),
            Err(Anomaly::NonFiniteGradient)
        );
    }

    #[test]
    fn learning_rate_halves_and_eases_back_and_halves_again() {
        let mut monitor = monitor();
        assert_eq!(monitor.lr_scale(40), 1.0);
        monitor.state = monitor.after_rollback(StabilityState::default(), 40, 47, 8..16);
        assert_eq!(monitor.lr_scale(40), 0.5);
        assert_eq!(monitor.lr_scale(45), 0.75);
        assert_eq!(monitor.lr_scale(50), 1.0);
        assert!(monitor.may_roll_back());
        monitor.state = monitor.after_rollback(StabilityState::default(), 40, 45, 24..32);
        assert_eq!(monitor.lr_scale(40), 0.375);
        assert!(!monitor.may_roll_back());
        assert_eq!(monitor.state.skipped, [8..16, 24..32]);
    }

    #[test]
    fn skipped_windows_are_jumped_over() {
        let state = StabilityState {
            skipped: vec![8..16, 16..24, 40..48],
            ..StabilityState::default()
        };
        assert_eq!(state.next_position(0, 8), 0);
        assert_eq!(state.next_position(1, 8), 24);
        assert_eq!(state.next_position(8, 8), 24);
        assert_eq!(state.next_position(33, 8), 48);
        assert_eq!(state.next_position(48, 8), 48);
    }

    #[test]
    fn checkpoints_become_stable_with_age() {
        assert!(!monitor().is_stable(10, 14));
        assert!(monitor().is_stable(10, 15));
    }
}
