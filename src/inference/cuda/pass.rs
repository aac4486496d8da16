//! One sequence: a token as one graph of launches, several in chunks.

use std::ops::Range;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use super::scorer::{Scored, Scorer};
use super::state::{CHUNK, State};
use super::{Layer, Linear, Network};
use crate::Result;
use crate::cuda::kernels::address;
use crate::cuda::kernels::token_norm::TokenRows;
use crate::cuda::{DevicePtr, Replay};

pub struct Pass<'a> {
    network: &'a Network,
    /// Tokens so far.
    len: usize,
    /// From the first token on.
    state: Option<State>,
    /// The launches of one token: where it stands is read from memory.
    replay: Replay<()>,
    /// Normalised final activations of the tokens last fed, (tokens, hidden), where they were
    /// several.
    hidden: Option<CudaSlice<f32>>,
    /// From the first [`Pass::log_likelihoods`] on.
    scorer: Option<Scorer<'a>>,
}

fn pointer<T>(slice: &CudaSlice<T>) -> DevicePtr<T> {
    DevicePtr::new(address(slice))
}

impl<'a> Pass<'a> {
    pub fn new(network: &'a Network) -> Self {
        Self {
            network,
            len: 0,
            state: None,
            replay: Replay::new(network.device.cuda_stream()),
            hidden: None,
            scorer: None,
        }
    }
}

impl crate::inference::model::Pass for Pass<'_> {
    fn feed(&mut self, ids: &[u32]) -> Result<()> {
        let network = self.network;
        let state = match &mut self.state {
            Some(state) => state,
            None => self.state.insert(State::new(network)?),
        };
        if let [id] = ids {
            self.hidden = None;
            network.send(state, self.len, &[*id])?;
            self.replay.run((), || network.token(state))?;
            self.len += 1;
            return Ok(());
        }
        let features = network.config.hidden_size;
        let stream = network.device.cuda_stream();
        // SAFETY: every chunk writes its part.
        let hidden = unsafe { stream.alloc::<f32>(ids.len() * features) }.w()?;
        for (i, chunk) in ids.chunks(CHUNK).enumerate() {
            network.send(state, self.len, chunk)?;
            let to = pointer(&hidden).offset(i * CHUNK * features);
            network.tokens(state, [self.len, chunk.len()], to)?;
            self.len += chunk.len();
        }
        self.hidden = Some(hidden);
        Ok(())
    }

    fn logits(&mut self, rows: Range<usize>) -> Result<Vec<f32>> {
        let Some(state) = &mut self.state else {
            return Ok(Vec::new());
        };
        let network = self.network;
        let stream = network.device.cuda_stream();
        let head = network.lm_head();
        let Some(hidden) = &self.hidden else {
            return read(state);
        };
        let x = pointer(hidden).offset(rows.start * network.config.hidden_size);
        if rows.len() == 1 {
            // SAFETY: there is such a row, and room for its logits.
            unsafe {
                network
                    .vocabulary
                    .head(x, head, pointer(&state.logits), 1)?
            };
            return read(state);
        }
        // SAFETY: the kernel writes all of it.
        let logits = unsafe { stream.alloc::<f32>(rows.len() * head.rows()) }.w()?;
        // SAFETY: as above.
        unsafe {
            network
                .vocabulary
                .head(x, head, pointer(&logits), rows.len())?
        };
        Ok(stream.clone_dtoh(&logits).w()?)
    }

    fn log_likelihoods(&mut self, targets: &[u32]) -> Result<Vec<f32>> {
        let Some(state) = &self.state else {
            return Ok(Vec::new());
        };
        let scorer = match &mut self.scorer {
            Some(scorer) => scorer,
            None => self.scorer.insert(Scorer::new(self.network)?),
        };
        let of = match &self.hidden {
            Some(hidden) => Scored::Hidden(pointer(hidden)),
            None => Scored::Logits(pointer(&state.logits)),
        };
        // SAFETY: of each token last fed there is a target.
        unsafe { scorer.log_likelihoods(of, targets) }
    }

    fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

/// The logits of one token, through memory that the GPU writes without help.
fn read(state: &mut State) -> Result<Vec<f32>> {
    let stream = state.logits.stream().clone();
    stream
        .memcpy_dtoh(&state.logits, &mut state.host_logits)
        .w()?;
    stream.synchronize().w()?;
    Ok(state.host_logits.as_slice().w()?.to_vec())
}

impl Network {
    /// Where the kernels of the next pass find its tokens.
    fn send(&self, state: &mut State, position: usize, ids: &[u32]) -> Result<()> {
        let input = [&[position as u32], ids].concat();
        let mut place = state.input.slice_mut(..input.len());
        Ok(self
            .device
            .cuda_stream()
            .memcpy_htod(&input, &mut place)
            .w()?)
    }

    fn final_rows(&self, rows: usize) -> TokenRows {
        TokenRows {
            rows,
            features: self.config.hidden_size,
            norm: pointer(&self.norm),
        }
    }

    /// The one token that was sent -> its final activations and logits in the state.
    fn token(&self, state: &State) -> Result<()> {
        let (x, wide, attention) = (
            pointer(&state.x),
            pointer(&state.wide),
            pointer(&state.attention),
        );
        let (hidden, logits) = (pointer(&state.hidden), pointer(&state.logits));
        let attention_state = state.attention_state();
        // SAFETY: the state has room for one token and what it becomes.
        unsafe {
            self.vocabulary
                .embed(state.ids(), &self.embed_tokens, x, 1)?;
            for (i, layer) in self.layers.iter().enumerate() {
                let cache = state.layer_cache(i);
                self.linear.store(x, layer.qkv.normed(), wide)?;
                self.attention
                    .token(wide, cache, attention_state, attention)?;
                self.linear.add(attention, layer.o.normed(), x)?;
                self.linear.gate(x, layer.gate_up.normed(), wide)?;
                self.linear.add(wide, layer.down.normed(), x)?;
            }
            self.token_norm
                .add_norm(x, DevicePtr::NULL, self.final_rows(1), hidden, true)?;
            self.vocabulary.head(hidden, self.lm_head(), logits, 1)
        }
    }

    /// The tokens that were sent, which follow the `before` first -> their normalised final
    /// activations (tokens, hidden).
    fn tokens(
        &self,
        state: &mut State,
        [before, tokens]: [usize; 2],
        hidden: DevicePtr<f32>,
    ) -> Result<()> {
        let (x, y) = (pointer(&state.x), pointer(&state.y));
        // SAFETY: a chunk is at most what the state has room for.
        unsafe {
            self.vocabulary
                .embed(state.ids(), &self.embed_tokens, x, tokens)?;
            for (i, layer) in self.layers.iter().enumerate() {
                self.layer(state, i, layer, [before, tokens])?;
            }
            self.token_norm
                .add_norm(x, y, self.final_rows(tokens), hidden, false)
        }
    }

    /// Adds `y`, what the layer before has made of it, to the residual stream, and leaves its own
    /// there.
    unsafe fn layer(
        &self,
        state: &mut State,
        index: usize,
        layer: &Layer,
        [before, tokens]: [usize; 2],
    ) -> Result<()> {
        let addend = match index {
            0 => DevicePtr::NULL,
            _ => pointer(&state.y),
        };
        let cache = state.layer_cache(index);
        let attention_state = state.attention_state();
        let (x, attention) = (pointer(&state.x), pointer(&state.attention));
        // SAFETY: the caller's promise.
        unsafe {
            self.normalise(state, x, addend, &layer.qkv, tokens)?;
            self.multiply(state, &layer.qkv, tokens, Target::Wide)?;
            let qkv = pointer(&state.wide);
            self.attention
                .tokens(qkv, cache, attention_state, attention, [before, tokens])?;
            self.normalise(state, attention, DevicePtr::NULL, &layer.o, tokens)?;
            self.multiply(state, &layer.o, tokens, Target::Y)?;
            self.normalise(state, x, pointer(&state.y), &layer.gate_up, tokens)?;
            self.multiply(state, &layer.gate_up, tokens, Target::Wide)?;
            self.token_norm.gate_norm_quantize(
                pointer(&state.wide),
                self.config.activation,
                layer.down.rows(tokens),
                state.token_codes(layer.down.weights.cols()),
            )?;
            self.multiply(state, &layer.down, tokens, Target::Y)
        }
    }

    /// x += y -> codes of x normalised, as the projection takes them.
    unsafe fn normalise(
        &self,
        state: &State,
        x: DevicePtr<f32>,
        y: DevicePtr<f32>,
        linear: &Linear,
        tokens: usize,
    ) -> Result<()> {
        let codes = state.token_codes(linear.weights.cols());
        // SAFETY: the caller's promise.
        unsafe {
            self.token_norm
                .add_norm_quantize(x, y, linear.rows(tokens), codes)
        }
    }

    /// The product of the codes.
    fn multiply(
        &self,
        state: &mut State,
        linear: &Linear,
        tokens: usize,
        target: Target,
    ) -> Result<()> {
        let w = &linear.weights;
        let codes = state.codes.slice(..tokens * w.cols());
        let scales = state.scales.slice(..tokens);
        let target = match target {
            Target::Wide => &mut state.wide,
            Target::Y => &mut state.y,
        };
        let mut target = target.slice_mut(..tokens * w.rows());
        self.matmul.scaled(&codes, &scales, tokens, w, &mut target)
    }
}

/// Where a product goes.
enum Target {
    Wide,
    Y,
}

impl Linear {
    fn rows(&self, rows: usize) -> TokenRows {
        TokenRows {
            rows,
            features: self.features(),
            norm: self.norm(),
        }
    }
}
