//! The template by which a run writes its records.

use super::options::{FineTuning, TemplateChoice};
use crate::chat::ChatTemplate;
use crate::data::Data;
use crate::prompt::PromptTemplate;
use crate::tokenize::Template;
use crate::{Error, Pretrained, files};

impl FineTuning {
    /// The template for these records, the same for those that are held out, and whether it is the chat
    /// template for checkpoints that have none.
    ///
    /// # Errors
    ///
    /// Those of the file, and [`Error::Option`] for a prompt template where there are conversations.
    pub(super) fn template(
        &self,
        pretrained: &Pretrained,
        data: &[&Data],
    ) -> Result<(Box<dyn Template>, bool), Error> {
        let has_conversations = data.iter().any(|data| data.has_conversations);
        let template: Box<dyn Template> = match (&self.template, has_conversations) {
            (TemplateChoice::Chat, _) | (TemplateChoice::ByData, true) => {
                let template = ChatTemplate::of(pretrained)?;
                let is_default = template.is_default();
                return Ok((Box::new(template), is_default));
            }
            (TemplateChoice::ByData, false) => Box::new(PromptTemplate::default()),
            (TemplateChoice::File(_), true) => {
                return Err(Error::Option {
                    option: "prompt-template",
                    reason:
                        "the data has conversations, which the checkpoint's chat template writes"
                            .into(),
                });
            }
            (TemplateChoice::File(path), false) => {
                let template = PromptTemplate::new(files::text(path)?);
                Box::new(template.map_err(|reason| Error::field(path, "content", reason))?)
            }
        };
        Ok((template, false))
    }
}
