//! Conversations as the checkpoint's own chat template writes them, with the loss on the assistant's turns.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use regex::Regex;

use crate::batch::Sequence;
use crate::data::{Message, Record, Role};
use crate::tokenize::{Template, Tokens, settings_of, text_of};
use crate::{Error, Pretrained, files};

/// The template of a checkpoint that has none: the role between bars on a line of its own, then what is
/// said; the end token after an answer.
pub const DEFAULT: &str = "\
{%- for message in messages -%}
    {{- '<|' + message.role + '|>\\n' + message.content -}}
    {{- eos_token + '\\n' if message.role == 'assistant' else '\\n' -}}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt -}}";

/// What templates that ask for the date are told, so that the same data make the same tokens every day.
const DATE: [(&str, &str); 6] = [
    ("%d", "26"),
    ("%b", "Jul"),
    ("%B", "July"),
    ("%m", "07"),
    ("%y", "24"),
    ("%Y", "2024"),
];
const NAME: &str = "chat";

/// A chat template, written in Jinja.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The special tokens, by the names that templates know.
    special: BTreeMap<String, String>,
    source: String,
    /// The file it comes from; `None` for the default one.
    path: Option<PathBuf>,
    /// A file to name in messages.
    named: PathBuf,
}

impl ChatTemplate {
    /// That of `chat_template.jinja`, else of `tokenizer_config.json` (of several the one called
    /// `default`), else [`DEFAULT`].
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for a template that cannot be read.
    pub fn of(pretrained: &Pretrained) -> Result<Self, Error> {
        let settings = settings_of(pretrained)?;
        let (file, config) = ("chat_template.jinja", "tokenizer_config.json");
        let (source, path) = match (
            pretrained.known_files.get(file),
            settings.get("chat_template"),
        ) {
            (Some(bytes), _) => {
                let path = pretrained.path(file);
                (files::as_text(bytes, &path)?.to_string(), Some(path))
            }
            (None, Some(value)) => {
                let path = pretrained.path(config);
                let source = named_default(value).ok_or_else(|| {
                    let reason = "is neither a text nor a list with one called `default`";
                    Error::field(&path, "chat_template", reason)
                })?;
                (source.to_string(), Some(path))
            }
            (None, None) => (DEFAULT.into(), None),
        };
        let tokens = settings.iter().filter(|(name, _)| name.ends_with("_token"));
        let mut special: BTreeMap<String, String> = tokens
            .filter_map(|(name, token)| Some((name.clone(), text_of(token)?.into())))
            .collect();
        if path.is_none() && !special.contains_key("eos_token") {
            // As for the answers to problems.
            let tokens = Tokens::of(pretrained)?;
            special.insert("eos_token".into(), tokens.end().1.into());
        }
        let named = path.clone().unwrap_or_else(|| pretrained.path(config));
        let environment =
            environment(&source).map_err(|reason| Error::field(&named, "chat_template", reason))?;
        Ok(Self {
            environment,
            special,
            source,
            path,
            named,
        })
    }

    /// Whether the checkpoint has no template of its own.
    pub fn is_default(&self) -> bool {
        self.path.is_none()
    }

    /// The text of turns; with `asks` the beginning of an answer follows.
    ///
    /// # Errors
    ///
    /// What the template says, or what is wrong with it.
    pub fn render(&self, turns: &[Message], asks: bool) -> Result<String, String> {
        let turn = |turn: &Message| context! { role => turn.role.name(), content => &turn.content };
        let messages: Vec<Value> = turns.iter().map(turn).collect();
        let tokens: Value = self.special.clone().into();
        let template = self.environment.get_template(NAME).map_err(in_one_line)?;
        let text = template.render(context! {
            messages => messages, add_generation_prompt => asks,
            tools => Value::from(()), documents => Value::from(()), ..tokens
        });
        text.map_err(in_one_line)
    }

    /// The text of a whole conversation, and where its learned turns are in it.
    ///
    /// # Errors
    ///
    /// Those of [`render`](Self::render), and that the template rewrites turns when others follow, so
    /// that it cannot be told where an answer begins.
    fn conversation(&self, turns: &[Message]) -> Result<(String, Vec<Learned>), String> {
        let whole = self.render(turns, false)?;
        let mut learned = Vec::new();
        for (index, turn) in turns.iter().enumerate().filter(|(_, turn)| turn.is_learned) {
            let content = turn.content.trim();
            let start = match index {
                // Some templates need a turn to begin with.
                0 => whole.find(content).unwrap_or(0),
                _ => {
                    let question = self.render(&turns[..index], true)?;
                    let before = self.render(&turns[..index], false)?;
                    if !whole.starts_with(&question) && !whole.starts_with(&before) {
                        return Err(format!(
                            "writes what comes before turn {} in another way once that turn is \
                             there, so that it cannot be told where the answer begins",
                            index + 1
                        ));
                    }
                    common(&whole, &question)
                }
            };
            let until = self.render(&turns[..=index], false)?;
            let next = turns.get(index + 1).map(|turn| turn.content.trim());
            learned.push(match whole.starts_with(&until) {
                true => Learned::up_to(start, until.len()),
                false => Learned::by_content(&whole, start, content, next),
            });
        }
        Ok((whole, learned))
    }

    fn fail(&self, record: &Record, reason: String) -> Error {
        let beginning: String = record.instruction.chars().take(60).collect();
        let reason = format!("of the record with {beginning:?}: {reason}");
        Error::field(&self.named, "chat_template", reason)
    }
}

impl Template for ChatTemplate {
    fn key(&self) -> String {
        format!("chat {:?} {}", self.special, self.source)
    }

    fn prompt(&self, tokens: &Tokens, record: &Record) -> Result<Vec<u32>, Error> {
        let text = self.render(&question(record), true);
        let text = text.map_err(|reason| self.fail(record, reason))?;
        Ok(tokens.encode_with_places(&text)?.0)
    }

    /// Ids are those of transformers' `apply_chat_template`. Targets are the tokens of the learned
    /// turns, each up to the first token that ends an answer.
    fn sequence(&self, tokens: &Tokens, record: &Record) -> Result<(Sequence, bool), Error> {
        let mut turns = question(record);
        turns.push(Message::new(Role::Assistant, &record.answer));
        let conversation = self.conversation(&turns);
        let (text, learned) = conversation.map_err(|reason| self.fail(record, reason))?;
        let (ids, places) = tokens.encode_with_places(&text)?;
        let mut is_joined = false;
        let mut targets: Vec<Range<usize>> = Vec::new();
        for Learned { start, end, limit } in learned {
            let done = targets.last().map_or(0, |range| range.end);
            let first = places.partition_point(|place| place.end <= start).max(done);
            let up_to = |end| places.partition_point(|place| place.start < end).max(first);
            is_joined |= first < up_to(end) && places[first].start < start;
            let last = (first..up_to(limit)).find(|&place| tokens.is_end(ids[place]));
            targets.push(first..last.map_or(up_to(end), |last| last + 1));
        }
        Ok((Sequence::with_targets(ids, targets), is_joined))
    }
}

/// The place of a learned turn in a text, in bytes.
#[derive(Clone, Copy, Debug)]
struct Learned {
    /// Where the answer begins.
    start: usize,
    /// Where it ends, unless a token that ends answers tells.
    end: usize,
    /// Up to where such a token is looked for.
    limit: usize,
}

impl Learned {
    fn up_to(start: usize, end: usize) -> Self {
        let end = end.max(start);
        Self {
            start,
            end,
            limit: end,
        }
    }

    /// A turn that is not written as at the end of a conversation: it ends with its content, and the
    /// token that ends it comes before the next turn's.
    fn by_content(whole: &str, start: usize, content: &str, next: Option<&str>) -> Self {
        let find = |from: usize, text: &str| whole[from..].find(text).map(|place| from + place);
        let end = find(start, content).map_or(start, |place| place + content.len());
        let limit = next.and_then(|next| find(end, next)).unwrap_or(whole.len());
        Self { start, end, limit }
    }
}

/// The turns before the answer.
fn question(record: &Record) -> Vec<Message> {
    let mut turns = record.earlier.clone();
    let Record {
        instruction, input, ..
    } = record;
    let text = match input.is_empty() {
        true => instruction.clone(),
        false => format!("{instruction}\n\n{input}"),
    };
    if !text.is_empty() {
        turns.push(Message::new(Role::User, text));
    }
    turns
}

/// The template of this name where there are several.
fn named_default(value: &serde_json::Value) -> Option<&str> {
    let of_list = || {
        let is_default = |one: &&serde_json::Value| one.get("name").is_some_and(|n| n == "default");
        value
            .as_array()?
            .iter()
            .find(is_default)?
            .get("template")?
            .as_str()
    };
    value.as_str().or_else(of_list)
}

/// What transformers gives to templates, and how it reads them.
fn environment(source: &str) -> Result<Environment<'static>, String> {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    let mut environment = Environment::new();
    environment.set_syntax(syntax.expect("only white space differs from the default"));
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_function("raise_exception", |reason: String| -> Result<Value, _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason))
    });
    environment.add_function("strftime_now", |format: String| {
        let fill = |text: String, (name, value): &(&str, &str)| text.replace(name, value);
        DATE.iter().fold(format, fill)
    });
    // Marks of what a model generates, which change nothing of the text.
    let mark =
        |name| Regex::new(&format!(r"\{{%(-?)\s*{name}\s*(-?)%\}}")).expect("a valid pattern");
    let source = mark("generation").replace_all(source, "{%$1 if true $2%}");
    let source = mark("endgeneration").replace_all(&source, "{%$1 endif $2%}");
    let added = environment.add_template_owned(NAME, source.into_owned());
    added.map_err(in_one_line)?;
    Ok(environment)
}

fn in_one_line(error: minijinja::Error) -> String {
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), String::from);
    match error.line() {
        Some(line) => format!("line {line}: {}", detail.replace('\n', " ")),
        None => detail.replace('\n', " "),
    }
}

/// Bytes that two texts have in common at their beginning.
fn common(x: &str, y: &str) -> usize {
    let same = x.chars().zip(y.chars()).take_while(|(x, y)| x == y);
    same.map(|(x, _)| x.len_utf8()).sum()
}
