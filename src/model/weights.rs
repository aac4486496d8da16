//! One value for every weight of the network, by its place in it: the weight itself, a borrowed
//! slice of it, its gradient.

/// Field names are those of `transformers`' bitnet model.
#[derive(Clone, Debug)]
pub struct Weights<T> {
    pub embed_tokens: T,
    pub layers: Vec<LayerWeights<T>>,
    pub norm: T,
    /// `None` where the embedding serves as LM head.
    pub lm_head: Option<T>,
}

#[derive(Clone, Debug)]
pub struct LayerWeights<T> {
    pub input_layernorm: T,
    pub attn_sub_norm: T,
    pub post_attention_layernorm: T,
    pub ffn_sub_norm: T,
    pub q_proj: T,
    pub k_proj: T,
    pub v_proj: T,
    pub o_proj: T,
    pub gate_proj: T,
    pub up_proj: T,
    pub down_proj: T,
}

impl<T> Weights<T> {
    pub fn lm_head(&self) -> &T {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// The same places, filled by `f`.
    pub fn map<'a, U>(&'a self, f: impl Fn(&'a T) -> U) -> Weights<U> {
        Weights {
            embed_tokens: f(&self.embed_tokens),
            layers: self.layers.iter().map(|layer| layer.map(&f)).collect(),
            norm: f(&self.norm),
            lm_head: self.lm_head.as_ref().map(&f),
        }
    }

    /// All values in the order of [`super::Parameters`].
    pub fn into_values(self) -> impl Iterator<Item = T> {
        let layers = self.layers.into_iter().flat_map(LayerWeights::into_values);
        std::iter::once(self.embed_tokens)
            .chain(layers)
            .chain([self.norm])
            .chain(self.lm_head)
    }
}

impl<T> LayerWeights<T> {
    fn map<'a, U>(&'a self, f: impl Fn(&'a T) -> U) -> LayerWeights<U> {
        LayerWeights {
            input_layernorm: f(&self.input_layernorm),
            attn_sub_norm: f(&self.attn_sub_norm),
            post_attention_layernorm: f(&self.post_attention_layernorm),
            ffn_sub_norm: f(&self.ffn_sub_norm),
            q_proj: f(&self.q_proj),
            k_proj: f(&self.k_proj),
            v_proj: f(&self.v_proj),
            o_proj: f(&self.o_proj),
            gate_proj: f(&self.gate_proj),
            up_proj: f(&self.up_proj),
            down_proj: f(&self.down_proj),
        }
    }

    fn into_values(self) -> [T; 11] {
        [
            self.input_layernorm,
            self.attn_sub_norm,
            self.post_attention_layernorm,
            self.ffn_sub_norm,
            self.q_proj,
            self.k_proj,
            self.v_proj,
            self.o_proj,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
        ]
    }
}
