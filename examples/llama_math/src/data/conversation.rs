//! Conversations of several turns, in the fields of OpenAI (`messages`) or ShareGPT (`conversations`).

use serde_json::{Map, Value};

use super::record::{Message, Record, Role};

/// The names under which a conversation is found.
const FIELDS: [&str; 2] = ["messages", "conversations"];
/// A system prompt beside the turns.
const SYSTEM: &str = "system";

/// The turns of a row, if it holds a conversation.
pub(super) fn turns(row: &Map<String, Value>) -> Option<&Vec<Value>> {
    FIELDS
        .into_iter()
        .find_map(|name| row.get(name)?.as_array())
}

/// The record of a conversation: its last learned turn is the answer, the user's turn before it the
/// instruction. What follows teaches nothing and is left out.
///
/// # Errors
///
/// What is wrong with which turn.
pub(super) fn record(row: &Map<String, Value>, turns: &[Value]) -> Result<Record, String> {
    let mut messages = Vec::new();
    for (index, turn) in turns.iter().enumerate() {
        let turn = message(turn).map_err(|reason| format!("turn {}: {reason}", index + 1))?;
        messages.push(turn);
    }
    let has_system = messages
        .first()
        .is_some_and(|turn| turn.role == Role::System);
    if let (false, Some(Value::String(system))) = (has_system, row.get(SYSTEM))
        && !system.trim().is_empty()
    {
        messages.insert(0, Message::new(Role::System, system));
    }
    let last = messages.iter().rposition(|turn| turn.is_learned);
    let answer = match last {
        Some(last) => {
            messages.truncate(last + 1);
            messages.pop().expect("the last one").content
        }
        None => String::new(),
    };
    let is_question = messages.last().is_some_and(|turn| turn.role == Role::User);
    let question = if is_question { messages.pop() } else { None };
    Ok(Record {
        earlier: messages,
        instruction: question.map_or_else(String::new, |turn| turn.content),
        input: String::new(),
        answer,
    })
}

fn message(turn: &Value) -> Result<Message, String> {
    let Value::Object(turn) = turn else {
        return Err("is not a JSON object".into());
    };
    let named = |names: [&str; 2]| names.into_iter().find_map(|name| turn.get(name));
    let role = match named(["role", "from"]) {
        Some(Value::String(name)) => Role::parse(name)
            .ok_or_else(|| format!("role `{name}` is none of system, user and assistant"))?,
        _ => return Err("has no `role` or `from`".into()),
    };
    let has = |name: &str| match turn.get(name) {
        None | Some(Value::Null) => false,
        Some(Value::Array(values)) => !values.is_empty(),
        Some(_) => true,
    };
    if has("tool_calls") || has("function_call") {
        return Err("calls a tool, which is not supported".into());
    }
    let content = match named(["content", "value"]) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => parts.iter().map(part).collect::<Result<String, _>>()?,
        _ => return Err("has no text in `content` or `value`".into()),
    };
    let mut message = Message::new(role, content);
    // OpenAI's way to keep a turn out of the loss.
    if turn.get("weight").and_then(Value::as_f64) == Some(0.0) {
        message.is_learned = false;
    }
    Ok(message)
}

/// The text of a part of a turn.
fn part(part: &Value) -> Result<&str, String> {
    match (part.get("type").and_then(Value::as_str), part.get("text")) {
        (Some("text"), Some(Value::String(text))) => Ok(text),
        (kind, _) => Err(format!(
            "has a part of type `{}`, only text is supported",
            kind.unwrap_or("none")
        )),
    }
}
