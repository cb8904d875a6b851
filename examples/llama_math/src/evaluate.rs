//! Loss and exact match on held-out records.

use crate::batch::{MicroBatch, POSITIONS_PER_PASS, Sequence};
use crate::data::Record;
use crate::score::final_answer;
use crate::tokenize::{Template, Tokens};
use crate::{Continued, Error, Llama};

/// Positions for which keys and values are kept at once, at most: those of the prompts in a pass and of
/// their longest answers. At least one prompt is taken, whatever its length.
const POSITIONS: usize = 8192;

/// Greedy decoding with a key/value cache: for each prompt at most `limit` tokens after it, up to the one
/// for which `is_end` holds, which is left out. Several prompts share a pass, and one that ends makes room
/// for the next. `progress` is called once for each.
///
/// # Panics
///
/// If a prompt is empty.
pub fn greedy(
    model: &Llama,
    prompts: &[&[u32]],
    limit: usize,
    is_end: impl Fn(u32) -> bool,
    progress: impl Fn(),
) -> Vec<Vec<u32>> {
    let mut answers = vec![Vec::new(); prompts.len()];
    if limit == 0 {
        prompts.iter().for_each(|_| progress());
        return answers;
    }
    let mut waiting = prompts.iter().enumerate().peekable();
    let mut positions = 0;
    let mut places: Vec<usize> = Vec::new();
    let mut sequences: Vec<Continued> = Vec::new();
    loop {
        while let Some((place, prompt)) = waiting.next_if(|(_, prompt)| {
            sequences.is_empty() || positions + prompt.len() + limit <= POSITIONS
        }) {
            positions += prompt.len() + limit;
            places.push(place);
            sequences.push(Continued::new(prompt.to_vec()));
        }
        if sequences.is_empty() {
            return answers;
        }
        let next = model.next_logits(&mut sequences).argmax(1).into_data();
        let next: Vec<i64> = next.iter().collect();
        let rows = places.into_iter().zip(sequences).zip(next);
        (places, sequences) = rows
            .filter_map(|((place, mut sequence), next)| {
                let token = u32::try_from(next).expect("token ids are small and not negative");
                let answer = &mut answers[place];
                let goes_on = !is_end(token) && {
                    answer.push(token);
                    answer.len() < limit
                };
                match goes_on {
                    true => sequence.tokens.push(token),
                    false => {
                        positions -= prompts[place].len() + limit;
                        progress();
                    }
                }
                goes_on.then_some((place, sequence))
            })
            .unzip();
    }
}

/// Mean loss per target over all sequences. `progress` is called once for each.
pub fn mean_loss(model: &Llama, sequences: &[Sequence], progress: impl Fn()) -> f64 {
    let device = model.device();
    let (mut sum, mut count) = (0.0, 0);
    let used = sequences
        .iter()
        .filter(|sequence| sequence.num_targets() > 0)
        .collect::<Vec<_>>();
    for alike in used.chunk_by(|a, b| a.tokens.len() == b.tokens.len()) {
        for rows in alike.chunks((POSITIONS_PER_PASS / alike[0].tokens.len()).max(1)) {
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
    /// Number of its tokens.
    pub tokens: usize,
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

impl Solver<'_> {
    /// Answers one record.
    ///
    /// # Errors
    ///
    /// Those of the tokenizer.
    pub fn answer(&self, record: &Record) -> Result<Answer, Error> {
        let mut answers = self.answers(std::slice::from_ref(record), || ())?;
        Ok(answers.remove(0))
    }

    /// Answers records. `progress` is called once for each.
    ///
    /// # Errors
    ///
    /// Those of the tokenizer.
    pub fn answers(&self, records: &[Record], progress: impl Fn()) -> Result<Vec<Answer>, Error> {
        let is_end = |token| self.tokens.is_end(token);
        let prompts = records.iter();
        let prompts = prompts.map(|record| self.tokens.prompt(record, self.template));
        let prompts: Vec<Vec<u32>> = prompts.collect::<Result<_, _>>()?;
        let prompts: Vec<&[u32]> = prompts.iter().map(|prompt| &prompt[..]).collect();
        let limit = self.max_new_tokens;
        let answers = greedy(self.model, &prompts, limit, is_end, progress);
        let answers = records.iter().zip(answers);
        answers
            .map(|(record, answer)| self.mark(record, &answer))
            .collect()
    }

    /// The text of an answer, compared with the reference.
    fn mark(&self, record: &Record, answer: &[u32]) -> Result<Answer, Error> {
        let text = self.tokens.decode(answer)?;
        let correct = final_answer(&record.answer).map(|expected| {
            let found = final_answer(&text);
            found == Some(expected)
        });
        let tokens = answer.len();
        Ok(Answer {
            text,
            tokens,
            correct,
        })
    }
}
