//! Loss and exact match on held-out records.

use burn::tensor::{Int, Tensor, TensorData};

use crate::batch::{MicroBatch, Sequence};
use crate::data::Record;
use crate::score::final_answer;
use crate::tokenize::{PromptTemplate, Tokens};
use crate::{Cache, Error, Llama};

/// Greedy decoding with a key/value cache: at most `limit` tokens after `prompt`, without the one
/// for which `is_end` holds.
pub fn greedy(
    model: &Llama,
    prompt: &[u32],
    limit: usize,
    is_end: impl Fn(u32) -> bool,
) -> Vec<u32> {
    let device = model.device();
    let mut cache = Cache::default();
    let mut answer = Vec::new();
    let mut input: Vec<i64> = prompt.iter().map(|&token| i64::from(token)).collect();
    while answer.len() < limit {
        let shape = [1, input.len()];
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(input, shape), &device);
        let next: i64 = model
            .next_logits(tokens, &mut cache)
            .argmax(1)
            .into_scalar();
        let token = u32::try_from(next).expect("token ids are small and not negative");
        if is_end(token) {
            break;
        }
        answer.push(token);
        input = vec![next];
    }
    answer
}

/// Mean loss per target over all sequences.
pub fn mean_loss(model: &Llama, sequences: &[Sequence], progress: impl Fn()) -> f64 {
    let device = model.device();
    let (mut sum, mut count) = (0.0, 0);
    for sequence in sequences
        .iter()
        .filter(|sequence| sequence.num_targets() > 0)
    {
        let batch = MicroBatch::new(&[sequence]);
        let loss = model.target_loss(batch.tokens(&device), batch.targets());
        sum += loss.into_scalar::<f64>();
        count += batch.targets().len();
        progress();
    }
    sum / f64::from(u32::try_from(count.max(1)).expect("few targets"))
}

/// A generated answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// Whether its final answer is that of the reference; `None` if the reference has none.
    pub correct: Option<bool>,
}

/// Answers records by greedy decoding and compares their final answers with the references.
pub struct Solver<'a> {
    /// The model, in validation mode.
    pub model: &'a Llama,
    /// Its tokenizer.
    pub tokens: &'a Tokens,
    /// The prompt.
    pub template: &'a PromptTemplate,
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
}

impl Solver<'_> {
    /// Answers one record.
    ///
    /// # Errors
    ///
    /// Those of the tokenizer.
    pub fn answer(&self, record: &Record) -> Result<Answer, Error> {
        let prompt = self.tokens.prompt(record, self.template)?;
        let is_end = |token| self.tokens.is_end(token);
        let answer = greedy(self.model, &prompt, self.max_new_tokens, is_end);
        let text = self.tokens.decode(&answer)?;
        let correct = final_answer(&record.answer).map(|expected| {
            let found = final_answer(&text);
            found == Some(expected)
        });
        Ok(Answer { text, correct })
    }
}
