//! What fine-tuning does to what the tiny model knew: its loss on texts of the pre-training.

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::batch::Sequence;
use crate::evaluate::mean_loss;
use crate::problems::pretraining_text;
use crate::tokenize::Tokens;
use crate::{Error, Llama, tiny};

/// Texts that are measured.
const TEXTS: usize = 64;
/// Their seed, which the pre-training does not have.
const SEED: u64 = 20_250_518;

/// Mean loss per token of a model in validation mode on texts such as those of the pre-training.
///
/// # Errors
///
/// None for the embedded model.
pub fn text_loss(model: &Llama) -> Result<f64, Error> {
    let tokens = Tokens::of(&tiny::pretrained()?)?;
    let (mut rng, template) = (StdRng::seed_from_u64(SEED), tiny::template());
    let text = |_| {
        let text = pretraining_text(&template, &mut rng);
        Ok(Sequence::new(tokens.encode(&text)?, 0))
    };
    let texts: Vec<Sequence> = (0..TEXTS).map(text).collect::<Result<_, Error>>()?;
    Ok(mean_loss(model, &texts, || ()))
}
