//! Loss and exact match on held-out records.

use burn::tensor::{Int, Tensor, TensorData};

use crate::batch::{MicroBatch, Sequence};
use crate::data::Record;
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
    /// Whether its number is that of the reference.
    pub correct: bool,
}

/// Answers records by greedy decoding and compares their numbers with the references.
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
        let prompt = self
            .tokens
            .encode(&self.template.prompt(&record.instruction))?;
        let is_end = |token| self.tokens.is_end(token);
        let answer = greedy(self.model, &prompt, self.max_new_tokens, is_end);
        let text = self.tokens.decode(&answer)?;
        let expected = final_number(&record.answer);
        let correct = expected.is_some() && final_number(&text) == expected;
        Ok(Answer { text, correct })
    }
}

/// The number after the last `####`, else the last number of the text.
pub fn final_number(text: &str) -> Option<f64> {
    let numbers = |text: &str| -> Vec<f64> {
        let mut found = Vec::new();
        let mut current = String::new();
        let mut previous = ' ';
        for character in text.chars().chain([' ']) {
            let sign = character == '-' && current.is_empty() && !previous.is_alphanumeric();
            match character {
                '0'..='9' | '.' => current.push(character),
                // Thousands; a comma after which no digit follows ends up trailing.
                ',' if current.ends_with(|c: char| c.is_ascii_digit()) => {}
                _ => {
                    // A full stop may end the sentence.
                    if let Ok(number) = current.trim_end_matches('.').parse() {
                        found.push(number);
                    }
                    current.clear();
                    if sign {
                        current.push('-');
                    }
                }
            }
            previous = character;
        }
        found
    };
    match text.rsplit_once("####") {
        Some((_, marked)) => numbers(marked).first().copied(),
        None => numbers(text).last().copied(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found() {
        for (text, number) in [
            ("so 3 + 4 = 7\n#### 7", Some(7.0)),
            ("#### 1,234,567 eggs of 12", Some(1_234_567.0)),
            ("She has 4 left, and 5.50 dollars.", Some(5.5)),
            ("It is 20.", Some(20.0)),
            ("#### -3", Some(-3.0)),
            ("10-4 = 6", Some(6.0)),
            ("from 10-4", Some(4.0)),
            ("#### $1,000.00", Some(1000.0)),
            ("####", None),
            ("none", None),
        ] {
            assert_eq!(final_number(text), number, "{text}");
        }
    }
}
