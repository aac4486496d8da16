//! The choice of the next token.

use crate::random::SplitMix64;
use crate::simd::{exp, sum, vectorized};
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

impl Sampler {
    pub fn new(sampling: Sampling, seed: u64) -> Self {
        Self {
            sampling,
            random: SplitMix64(seed),
        }
    }

    /// The token that follows `context`, by the logits (vocab,) of the model, which are lost.
    pub fn next(&mut self, logits: &mut [f32], context: &[u32]) -> u32 {
        self.penalise(logits, context);
        let likeliest = likeliest(logits);
        if self.sampling.temperature == 0.0 {
            return likeliest;
        }
        let largest = logits[likeliest as usize];
        let temperature = (self.sampling.temperature as f32).max(f32::MIN_POSITIVE);
        to_weights(logits, largest, temperature);
        self.limit(logits);
        draw(logits, self.random.unit()).unwrap_or(likeliest)
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

    /// Takes their weight from the tokens that top-k, top-p and min-p exclude.
    fn limit(&self, weights: &mut [f32]) {
        let Sampling {
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        if top_k > 0 && top_k < weights.len() {
            keep_likeliest(weights, |count, _| count >= top_k);
        }
        if top_p < 1.0 {
            let wanted = top_p * block_sums(weights).sum::<f64>();
            keep_likeliest(weights, |_, sum| sum >= wanted);
        }
        for weight in weights.iter_mut() {
            if f64::from(*weight) < min_p {
                *weight = 0.0;
            }
        }
    }
}

/// The id of the largest logit, of equal ones the first.
pub fn likeliest(logits: &[f32]) -> u32 {
    let largest = largest(logits);
    let place = logits.iter().position(|logit| *logit == largest);
    place.unwrap_or(0) as u32
}

vectorized! {
    /// Of those that are numbers.
    fn largest(logits: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let (chunks, rest) = logits.as_chunks::<16>();
        for chunk in chunks {
            for (lane, logit) in lanes.iter_mut().zip(chunk) {
                *lane = if *logit > *lane { *logit } else { *lane };
            }
        }
        lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

vectorized! {
    /// Probabilities but for a factor: the weight of the largest logit is 1.
    fn to_weights(logits: &mut [f32], largest: f32, temperature: f32) {
        for x in logits.iter_mut() {
            *x = exp((*x - largest) / temperature);
        }
    }
}

/// Weights that are summed at a time.
const BLOCK: usize = 256;

fn block_sums(weights: &[f32]) -> impl Iterator<Item = f64> {
    weights
        .chunks(BLOCK)
        .map(|block| f64::from(block_sum(block)))
}

vectorized! {
    fn block_sum(weights: &[f32]) -> f32 {
        sum(weights)
    }
}

/// A token by its weight, for `unit` in [0, 1); `None` if weights are no numbers.
fn draw(weights: &[f32], unit: f64) -> Option<u32> {
    let sums: Vec<f64> = block_sums(weights).collect();
    let mut left = unit * sums.iter().sum::<f64>();
    for (block, sum) in sums.iter().enumerate() {
        if left < *sum {
            let mut last = None;
            for (id, weight) in weights.iter().enumerate().skip(block * BLOCK).take(BLOCK) {
                if *weight > 0.0 {
                    left -= f64::from(*weight);
                    last = Some(id as u32);
                }
                if left < 0.0 {
                    break;
                }
            }
            return last;
        }
        left -= sum;
    }
    None
}

/// Weights, all in [0, 1], fall into classes by their exponent and so many bits after it.
const CLASS_BITS: u32 = 4;
const CLASSES: usize = class(1.0) + 1;

const fn class(weight: f32) -> usize {
    (weight.to_bits() >> (f32::MANTISSA_DIGITS - 1 - CLASS_BITS)) as usize
}

/// Takes their weight from all tokens after the first, in order of weight and of equal weights in
/// that of ids, that are `enough` by their number and sum. By classes first, of which only one needs
/// sorting.
fn keep_likeliest(weights: &mut [f32], enough: impl Fn(usize, f64) -> bool) {
    let mut classes = [(0usize, 0f64); CLASSES];
    for weight in weights.iter() {
        // What is no number sums to none, and nothing is taken.
        let Some((count, sum)) = classes.get_mut(class(*weight)) else {
            return;
        };
        *count += 1;
        *sum += f64::from(*weight);
    }
    let (mut count, mut sum) = (0, 0.0);
    let last = (0..CLASSES).rev().find(|at| {
        let (in_class, sum_of_class) = classes[*at];
        let found = enough(count + in_class, sum + sum_of_class);
        if !found {
            count += in_class;
            sum += sum_of_class;
        }
        found
    });
    let Some(last) = last else { return };
    let ids = (0..).zip(weights.iter());
    let mut members: Vec<(u32, f32)> = ids
        .filter(|(_, weight)| class(**weight) == last)
        .map(|(id, weight)| (id, *weight))
        .collect();
    members.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let end = members.iter().find(|(_, weight)| {
        count += 1;
        sum += f64::from(*weight);
        enough(count, sum)
    });
    let Some((end, least)) = end else { return };
    for (id, weight) in (0..).zip(weights) {
        if *weight < *least || *weight == *least && id > *end {
            *weight = 0.0;
        }
    }
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

    /// Which tokens keep their weight, by sorting all of them.
    fn kept(weights: &[f32], sampling: &Sampling) -> Vec<bool> {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
        if sampling.top_k > 0 {
            order.truncate(sampling.top_k);
        }
        let sum_to =
            |end: usize| -> f64 { order[..end].iter().map(|id| f64::from(weights[*id])).sum() };
        let wanted = sampling.top_p * sum_to(order.len());
        let end = (1..order.len()).find(|end| sampling.top_p < 1.0 && sum_to(*end) >= wanted);
        let mut kept = vec![false; weights.len()];
        for id in &order[..end.unwrap_or(order.len())] {
            kept[*id] = f64::from(weights[*id]) >= sampling.min_p && weights[*id] > 0.0;
        }
        kept
    }

    #[test]
    fn limits_keep_what_sorting_all_tokens_keeps() {
        let mut random = SplitMix64(3);
        for case in 0..300 {
            let vocab = 1 + random.below(700) as usize;
            // Of few values, some cases have many equal weights.
            let step = [1e-6, 0.7][case % 2];
            let logits: Vec<f32> = (0..vocab)
                .map(|_| ((20.0 * random.unit() / step).round() * step) as f32)
                .collect();
            let sampling = Sampling {
                top_k: random.below(2) as usize * random.below(vocab as u64 + 2) as usize,
                top_p: if random.below(2) == 0 {
                    1.0
                } else {
                    random.unit().max(1e-3)
                },
                min_p: random.below(2) as f64 * random.unit().powi(4),
                ..Sampling::default()
            };
            let mut weights = logits.clone();
            to_weights(&mut weights, logits[likeliest(&logits) as usize], 1.7);
            let want = kept(&weights, &sampling);
            Sampler::new(sampling.clone(), 1).limit(&mut weights);
            let got: Vec<bool> = weights.iter().map(|weight| *weight > 0.0).collect();
            assert_eq!(got, want, "{vocab} tokens, {sampling:?}");
        }
    }

    #[test]
    fn logits_that_are_no_numbers_leave_the_likeliest() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = logits();
            logits[1] = bad;
            let sampling = Sampling {
                top_k: 3,
                top_p: 0.9,
                ..Sampling::default()
            };
            let id = Sampler::new(sampling, 1).next(&mut logits, &[]);
            assert_eq!(id, if bad.is_nan() { 0 } else { 1 });
        }
        assert_eq!(likeliest(&[f32::NAN; 3]), 0);
        let cold = Sampling {
            temperature: 1e-300,
            ..Sampling::default()
        };
        assert_eq!(Sampler::new(cold, 1).next(&mut logits(), &[]), 0);
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
