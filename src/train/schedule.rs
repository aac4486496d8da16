//! Learning rate and weight decay as a function of the step.

use crate::config::{Config, ScheduleKind};

/// The planned course of one run.
#[derive(Clone, Debug)]
pub struct LrSchedule {
    kind: ScheduleKind,
    steps: u64,
    warmup_steps: u64,
    peak_lr: f64,
    stage2_lr: f64,
    min_lr: f64,
    weight_decay: f64,
    decay_fraction: f64,
}

impl LrSchedule {
    pub fn new(config: &Config) -> Self {
        let schedule = &config.schedule;
        Self {
            kind: schedule.kind,
            steps: config.train.steps,
            warmup_steps: schedule.warmup_steps,
            peak_lr: config.optimizer.lr,
            stage2_lr: schedule.stage2_lr,
            min_lr: schedule.min_lr,
            weight_decay: config.optimizer.weight_decay,
            decay_fraction: schedule.decay_fraction,
        }
    }

    /// Learning rate of step `step`, counted from 0. Warm-up reaches the peak at its last step;
    /// decays reach `min_lr` at the last step of the run.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak_lr * (step + 1) as f64 / self.warmup_steps as f64;
        }
        match self.kind {
            ScheduleKind::Constant => self.peak_lr,
            ScheduleKind::Linear => self.linear(self.peak_lr, step, self.warmup_steps),
            ScheduleKind::Cosine => {
                let angle = std::f64::consts::PI * self.progress(step, self.warmup_steps);
                self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1.0 + angle.cos())
            }
            ScheduleKind::Wsd => self.linear(self.peak_lr, step, self.decay_start()),
            ScheduleKind::TwoStage if step < self.midpoint() => self.peak_lr,
            ScheduleKind::TwoStage => self.linear(self.stage2_lr, step, self.midpoint()),
        }
    }

    /// Weight decay of step `step`: constant, but 0 in the second stage of `two_stage`.
    pub fn weight_decay(&self, step: u64) -> f64 {
        match self.kind {
            ScheduleKind::TwoStage if step >= self.midpoint() => 0.0,
            _ => self.weight_decay,
        }
    }

    /// Whether the plan jumps at `step`: no spike, whatever the loss does there.
    pub fn jumps_at(&self, step: u64) -> bool {
        self.kind == ScheduleKind::TwoStage && step == self.midpoint()
    }

    fn midpoint(&self) -> u64 {
        self.steps / 2
    }

    fn decay_start(&self) -> u64 {
        let decay_steps = (self.steps as f64 * self.decay_fraction).round() as u64;
        (self.steps - decay_steps).max(self.warmup_steps)
    }

    /// 0 at `start` (and before), 1 at the last step.
    fn progress(&self, step: u64, start: u64) -> f64 {
        let length = (self.steps - 1).saturating_sub(start).max(1);
        (step.saturating_sub(start) as f64 / length as f64).min(1.0)
    }

    fn linear(&self, from: f64, step: u64, start: u64) -> f64 {
        from + (self.min_lr - from) * self.progress(step, start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> LrSchedule {
        LrSchedule {
            kind,
            steps: 101,
            warmup_steps: 10,
            peak_lr: 1.0,
            stage2_lr: 0.5,
            min_lr: 0.1,
            weight_decay: 0.1,
            decay_fraction: 0.2,
        }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn every_schedule_warms_up_and_ends_as_planned() {
        use ScheduleKind::*;
        for (kind, last) in [
            (TwoStage, 0.1),
            (Cosine, 0.1),
            (Wsd, 0.1),
            (Linear, 0.1),
            (Constant, 1.0),
        ] {
            let plan = schedule(kind);
            assert!(close(plan.lr(0), 0.1), "{kind:?}");
            assert!(close(plan.lr(4), 0.5), "{kind:?}");
            assert!(close(plan.lr(9), 1.0), "{kind:?}");
            assert!(close(plan.lr(10), 1.0), "{kind:?}");
            assert!(close(plan.lr(100), last), "{kind:?}: {}", plan.lr(100));
        }
    }

    #[test]
    fn shapes_in_between() {
        assert!(close(schedule(ScheduleKind::Linear).lr(55), 0.55));
        assert!(close(schedule(ScheduleKind::Cosine).lr(55), 0.55));
        let wsd = schedule(ScheduleKind::Wsd);
        // 20 of 101 steps decay: from step 81 to step 100.
        assert!(close(wsd.lr(81), 1.0) && wsd.lr(82) < 1.0);
        let two_stage = schedule(ScheduleKind::TwoStage);
        assert!(close(two_stage.lr(49), 1.0) && close(two_stage.lr(50), 0.5));
        assert!(close(two_stage.lr(75), 0.3));
        assert!(two_stage.jumps_at(50) && !two_stage.jumps_at(49));
        assert!(close(two_stage.weight_decay(49), 0.1));
        assert_eq!(two_stage.weight_decay(50), 0.0);
        assert!(close(wsd.weight_decay(100), 0.1) && !wsd.jumps_at(50));
    }
}
