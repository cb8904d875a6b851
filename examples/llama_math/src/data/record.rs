//! A record, and the turns of a conversation.

/// A problem and its answer, or a conversation up to an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// The turns before the instruction; of a problem there are none.
    pub earlier: Vec<Message>,
    /// What the model is asked. Empty only in a conversation where no question precedes the answer.
    pub instruction: String,
    /// Alpaca's context of the instruction; empty if there is none.
    pub input: String,
    /// What it is to answer.
    pub answer: String,
}

/// Who says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// What holds for the whole conversation.
    System,
    /// Who asks.
    User,
    /// Who answers: the model.
    Assistant,
}

impl Role {
    /// The name that chat templates know.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        match name {
            "system" | "developer" => Some(Self::System),
            "user" | "human" => Some(Self::User),
            "assistant" | "gpt" | "model" | "bot" | "chatgpt" => Some(Self::Assistant),
            _ => None,
        }
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// Whether the model learns to say it; only of the assistant.
    pub is_learned: bool,
}

impl Message {
    /// A turn; that of an assistant is learned.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            is_learned: role == Role::Assistant,
        }
    }
}
