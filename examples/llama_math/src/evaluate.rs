//! Loss and exact match on held-out records.

use std::collections::BTreeMap;

use burn::tensor::{Int, Tensor, TensorData};

use crate::batch::{MicroBatch, Sequence};
use crate::data::Record;
use crate::score::final_answer;
use crate::tokenize::{Template, Tokens};
use crate::{Cache, Error, Llama};

/// Greedy decoding with a key/value cache: for each prompt at most `limit` tokens after it, up to the
/// one for which `is_end` holds, which is left out.
///
/// # Panics
///
/// If there is no prompt, or if they have different lengths.
pub fn greedy(
    model: &Llama,
    prompts: &[&[u32]],
    limit: usize,
    is_end: impl Fn(u32) -> bool,
) -> Vec<Vec<u32>> {
    let (device, rows) = (model.device(), prompts.len());
    let length = prompts[0].len();
    let is_even = prompts.iter().all(|prompt| prompt.len() == length);
    assert!(is_even, "prompts of one batch have one length");
    let mut cache = Cache::default();
    let mut answers = vec![Vec::new(); rows];
    let mut ended = vec![false; rows];
    let tokens = prompts.iter().copied().flatten();
    let mut input: Vec<i64> = tokens.map(|&token| i64::from(token)).collect();
    for _ in 0..limit {
        let shape = [rows, input.len() / rows];
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(input, shape), &device);
        let next = model.next_logits(tokens, &mut cache).argmax(1);
        // A row that has ended goes on with the others; what follows there is left out.
        input = next.into_data().iter::<i64>().collect();
        for ((answer, ended), &next) in answers.iter_mut().zip(&mut ended).zip(&input) {
            let token = u32::try_from(next).expect("token ids are small and not negative");
            *ended |= is_end(token);
            if !*ended {
                answer.push(token);
            }
        }
        if ended.iter().all(|&ended| ended) {
            break;
        }
    }
    answers
}

/// Tokens that one forward pass takes of sequences that stand beside each other and have one length.
/// At least one sequence is taken, whatever its length.
const TOKENS_PER_PASS: usize = 256;

/// Mean loss per target over all sequences. `progress` is called once for each.
pub fn mean_loss(model: &Llama, sequences: &[Sequence], progress: impl Fn()) -> f64 {
    let device = model.device();
    let (mut sum, mut count) = (0.0, 0);
    let used = sequences
        .iter()
        .filter(|sequence| sequence.num_targets() > 0)
        .collect::<Vec<_>>();
    for alike in used.chunk_by(|a, b| a.tokens.len() == b.tokens.len()) {
        for rows in alike.chunks((TOKENS_PER_PASS / alike[0].tokens.len()).max(1)) {
            let batch = MicroBatch::new(rows);
            let loss = batch.loss(model, &device);
            sum += loss.into_scalar::<f64>();
            count += batch.targets().len();
            rows.iter().for_each(|_| progress());
        }
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
    pub template: &'a dyn Template,
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
}

/// Records that are answered at once, if their prompts have one length.
const BATCH: usize = 32;

impl Solver<'_> {
    /// Answers one record.
    ///
    /// # Errors
    ///
    /// Those of the tokenizer.
    pub fn answer(&self, record: &Record) -> Result<Answer, Error> {
        let mut answers = self.answers(std::slice::from_ref(record))?;
        Ok(answers.remove(0))
    }

    /// Answers records, those with prompts of one length together.
    ///
    /// # Errors
    ///
    /// Those of the tokenizer.
    pub fn answers(&self, records: &[Record]) -> Result<Vec<Answer>, Error> {
        let mut by_length: BTreeMap<usize, Vec<(usize, Vec<u32>)>> = BTreeMap::new();
        for (place, record) in records.iter().enumerate() {
            let prompt = self.tokens.prompt(record, self.template)?;
            let group = by_length.entry(prompt.len()).or_default();
            group.push((place, prompt));
        }
        let mut answers = vec![None; records.len()];
        let is_end = |token| self.tokens.is_end(token);
        for batch in by_length.values().flat_map(|group| group.chunks(BATCH)) {
            let prompts: Vec<&[u32]> = batch.iter().map(|(_, prompt)| &prompt[..]).collect();
            let found = greedy(self.model, &prompts, self.max_new_tokens, is_end);
            for ((place, _), answer) in batch.iter().zip(found) {
                answers[*place] = Some(self.mark(&records[*place], &answer)?);
            }
        }
        let all = answers.into_iter();
        Ok(all.map(|answer| answer.expect("of a group")).collect())
    }

    /// The text of an answer, compared with the reference.
    fn mark(&self, record: &Record, answer: &[u32]) -> Result<Answer, Error> {
        let text = self.tokens.decode(answer)?;
        let correct = final_answer(&record.answer).map(|expected| {
            let found = final_answer(&text);
            found == Some(expected)
        });
        Ok(Answer { text, correct })
    }
}
