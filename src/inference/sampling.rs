//! The choice of the next token.

use crate::random::SplitMix64;
use crate::{Error, Result};

/// How a token is drawn, in this order, as in `transformers`: penalty, temperature, top-k, top-p,
/// min-p.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; at 0 the likeliest token is taken, whatever the limits below.
    pub temperature: f64,
    /// Only the k likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens whose probabilities sum to p (nucleus sampling, arXiv 1904.09751).
    pub top_p: f64,
    /// Only tokens at least p times as probable as the likeliest (arXiv 2407.01082).
    pub min_p: f64,
    /// Logits of tokens that were there before are divided by it, multiplied where negative (CTRL,
    /// arXiv 1909.05858).
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    /// Draws from the model's own distribution.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

/// Draws tokens; the same ones from the same logits and seed.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: SplitMix64,
}

impl Sampling {
    /// # Errors
    /// The first value that cannot be: its flag, the value, and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let share = |x: f64| (0.0..=1.0).contains(&x);
        for (flag, value, allowed, what) in [
            (
                "--temperature",
                self.temperature,
                self.temperature == 0.0 || positive(self.temperature),
                "0 (the likeliest token) or a finite number above it",
            ),
            (
                "--top-p",
                self.top_p,
                share(self.top_p) && self.top_p > 0.0,
                "above 0 and at most 1",
            ),
            ("--min-p", self.min_p, share(self.min_p), "from 0 to 1"),
            (
                "--repetition-penalty",
                self.repetition_penalty,
                positive(self.repetition_penalty),
                "a finite number above 0",
            ),
        ] {
            if !allowed {
                return Err(Error::usage(format!("{flag} {value}: must be {what}")));
            }
        }
        Ok(())
    }
}

/// A token and its weight, the largest of which is 1.
type Candidate = (u32, f64);

impl Sampler {
    pub fn new(sampling: Sampling, seed: u64) -> Self {
        Self {
            sampling,
            random: SplitMix64(seed),
        }
    }

    /// The token that follows `context`, by the logits (vocab,) of the model, which the penalty
    /// changes.
    pub fn next(&mut self, logits: &mut [f32], context: &[u32]) -> u32 {
        self.penalise(logits, context);
        let likeliest = likeliest(logits);
        if self.sampling.temperature == 0.0 {
            return likeliest;
        }
        let largest = f64::from(logits[likeliest as usize]);
        let weight = |l: f32| ((f64::from(l) - largest) / self.sampling.temperature).exp();
        let mut candidates: Vec<Candidate> = (0..).zip(logits.iter().map(|l| weight(*l))).collect();
        self.limit(&mut candidates);
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut left = self.random.unit() * total;
        for (id, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return *id;
            }
        }
        likeliest
    }

    fn penalise(&self, logits: &mut [f32], context: &[u32]) {
        let penalty = self.sampling.repetition_penalty as f32;
        if penalty == 1.0 {
            return;
        }
        let mut seen = context.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            let logit = &mut logits[id as usize];
            *logit = if *logit > 0.0 {
                *logit / penalty
            } else {
                *logit * penalty
            };
        }
    }

    /// Drops the candidates that top-k, top-p and min-p exclude.
    fn limit(&self, candidates: &mut Vec<Candidate>) {
        let Sampling {
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        // The likelier first, of equal ones that of the lower id.
        let order = |a: &Candidate, b: &Candidate| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, order);
            candidates.truncate(top_k);
        }
        if top_p < 1.0 {
            let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
            let wanted = top_p * total;
            // Those below it all together are less than what is not wanted: they need no sorting.
            let negligible = (total - wanted) / candidates.len() as f64;
            candidates.retain(|(_, weight)| *weight >= negligible);
            candidates.sort_unstable_by(order);
            let mut sum = 0.0;
            let enough = candidates.iter().position(|(_, weight)| {
                sum += weight;
                sum >= wanted
            });
            candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
        }
        candidates.retain(|(_, weight)| *weight >= min_p);
    }
}

/// The id of the largest logit, of equal ones the first.
pub fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logs of the probabilities 0.5, 0.1, 0.3, 0.06, 0.04, shifted.
    fn logits() -> Vec<f32> {
        [0.5, 0.1, 0.3, 0.06, 0.04]
            .map(|p: f32| p.ln() + 3.0)
            .to_vec()
    }

    /// Shares of the tokens over many draws.
    fn shares(sampling: Sampling, context: &[u32]) -> [f64; 5] {
        const DRAWS: usize = 40_000;
        let mut sampler = Sampler::new(sampling, 7);
        let mut shares = [0.0; 5];
        for _ in 0..DRAWS {
            shares[sampler.next(&mut logits(), context) as usize] += 1.0 / DRAWS as f64;
        }
        shares
    }

    /// Within five standard errors of the expected probabilities.
    #[track_caller]
    fn assert_shares(got: [f64; 5], expected: [f64; 5]) {
        let total: f64 = expected.iter().sum();
        for (got, expected) in got.iter().zip(expected.map(|p| p / total)) {
            let error = 5.0 * (expected * (1.0 - expected) / 40_000.0).sqrt();
            assert!((got - expected).abs() <= error, "{got}, not {expected}");
        }
    }

    #[test]
    fn tokens_are_drawn_by_their_probability() {
        let all = Sampling::default();
        assert_shares(shares(all.clone(), &[]), [0.5, 0.1, 0.3, 0.06, 0.04]);
        let squares = [0.25, 0.01, 0.09, 0.0036, 0.0016];
        let temperature = Sampling {
            temperature: 0.5,
            ..all
        };
        assert_shares(shares(temperature, &[]), squares);
    }

    #[test]
    fn each_limit_leaves_the_tokens_that_it_should() {
        let all = Sampling::default();
        let top_k = Sampling {
            top_k: 2,
            ..all.clone()
        };
        assert_shares(shares(top_k, &[]), [0.5, 0.0, 0.3, 0.0, 0.0]);
        // 0.5 + 0.3 is not yet 0.85.
        let top_p = Sampling {
            top_p: 0.85,
            ..all.clone()
        };
        assert_shares(shares(top_p, &[]), [0.5, 0.1, 0.3, 0.0, 0.0]);
        let min_p = Sampling {
            min_p: 0.11,
            ..all.clone()
        };
        assert_shares(shares(min_p, &[]), [0.5, 0.1, 0.3, 0.06, 0.0]);
        let together = Sampling {
            top_k: 3,
            top_p: 0.7,
            ..all
        };
        // Of 0.9 together, 0.5 is 56% and 0.8 is 89%.
        assert_shares(shares(together, &[]), [0.5, 0.0, 0.3, 0.0, 0.0]);
    }

    #[test]
    fn the_likeliest_is_taken_at_temperature_0_unless_it_was_there_before() {
        let greedy = Sampling {
            temperature: 0.0,
            ..Sampling::default()
        };
        assert_eq!(Sampler::new(greedy.clone(), 1).next(&mut logits(), &[]), 0);
        let penalised = Sampling {
            repetition_penalty: 2.0,
            ..greedy
        };
        let mut logits = logits();
        assert_eq!(
            Sampler::new(penalised.clone(), 1).next(&mut logits, &[0, 0, 4]),
            2
        );
        // Once, however often it was there.
        assert_eq!(logits[0], (0.5f32.ln() + 3.0) / 2.0);
        let mut negative = [-1.0, -1.5];
        assert_eq!(Sampler::new(penalised, 1).next(&mut negative, &[0]), 1);
        assert_eq!(negative, [-2.0, -1.5]);
    }

    #[test]
    fn a_seed_repeats_its_draws() {
        let draws = |seed| {
            let mut sampler = Sampler::new(Sampling::default(), seed);
            (0..50)
                .map(|_| sampler.next(&mut logits(), &[]))
                .collect::<Vec<_>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn values_that_cannot_be_are_refused_by_their_flag() {
        let refusal = |sampling: Sampling| sampling.validate().unwrap_err().to_string();
        let all = Sampling::default();
        all.validate().unwrap();
        let temperature = Sampling {
            temperature: -1.0,
            ..all.clone()
        };
        assert!(refusal(temperature).starts_with("--temperature -1: must be 0"));
        let top_p = Sampling {
            top_p: 0.0,
            ..all.clone()
        };
        assert!(refusal(top_p).contains("--top-p 0: must be above 0"));
        let min_p = Sampling {
            min_p: f64::NAN,
            ..all
        };
        assert!(refusal(min_p).contains("--min-p NaN"));
    }
}
