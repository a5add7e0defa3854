//! The first document of a kubeconfig as a tree of nodes that know where in the text they are.
//!
//! kubectl, too, reads the first document only and ignores what follows it.

use std::borrow::Cow;

use granit_parser::{Event, Parser, ScalarStyle, Span, StructureStyle};

use super::error::Fault;

/// One node and its place, in bytes of the text.
#[derive(Debug)]
pub(super) struct Node<'a> {
    pub(super) start: usize,
    /// Behind its last visible byte. Behind the last line break where it is a block scalar.
    pub(super) end: usize,
    /// Column of `start`, from 0, in characters.
    pub(super) column: usize,
    /// It has an anchor or a tag, which are in front of `start`.
    pub(super) decorated: bool,
    pub(super) kind: Kind<'a>,
}

#[derive(Debug)]
pub(super) enum Kind<'a> {
    Scalar {
        text: Cow<'a, str>,
        style: ScalarStyle,
    },
    Sequence {
        flow: bool,
        items: Vec<Node<'a>>,
    },
    Mapping {
        flow: bool,
        pairs: Vec<(Node<'a>, Node<'a>)>,
    },
    /// The number of the anchor that it refers to.
    Alias(usize),
}

/// A collection that has begun.
struct Open<'a> {
    node: Node<'a>,
    /// A mapping's key that waits for its value.
    key: Option<Node<'a>>,
}

impl<'a> Node<'a> {
    /// Parses the first document; `None` if there is nothing in it.
    pub(super) fn parse(text: &'a str) -> Result<Option<Self>, Fault> {
        let mut options = granit_parser::Options::default();
        options.set_emit_comments(false);
        // As libyaml and its port in Go do.
        options.bom_inside_document_as_content = true;
        options.block_scalar_eof_without_line_feed = true;
        let mut open: Vec<Open<'a>> = Vec::new();
        for event in Parser::new_from_str_with_options(text, options) {
            let (event, span) = event?;
            let done = match event {
                Event::DocumentEnd | Event::StreamEnd => return Ok(None),
                Event::Scalar(value, style, anchor, tag) => {
                    let kind = Kind::Scalar { text: value, style };
                    Self::at(text, &span, anchor > 0 || tag.is_some(), kind)?
                }
                Event::Alias(anchor) => Self::at(text, &span, false, Kind::Alias(anchor))?,
                Event::SequenceStart(style, anchor, tag) => {
                    let kind = Kind::Sequence {
                        flow: style == StructureStyle::Flow,
                        items: Vec::new(),
                    };
                    let node = Self::at(text, &span, anchor > 0 || tag.is_some(), kind)?;
                    open.push(Open { node, key: None });
                    continue;
                }
                Event::MappingStart(style, anchor, tag) => {
                    let kind = Kind::Mapping {
                        flow: style == StructureStyle::Flow,
                        pairs: Vec::new(),
                    };
                    let node = Self::at(text, &span, anchor > 0 || tag.is_some(), kind)?;
                    open.push(Open { node, key: None });
                    continue;
                }
                Event::SequenceEnd | Event::MappingEnd => {
                    let Some(Open { mut node, .. }) = open.pop() else {
                        return Err(Fault::Unbalanced);
                    };
                    if node.is_flow() {
                        // A block collection has no closing token; its end is that of its last
                        // item, without the comments behind it.
                        node.end = range(&span)?.1;
                    }
                    node
                }
                _ => continue,
            };
            let Some(parent) = open.last_mut() else {
                return Ok(Some(done));
            };
            // A flow collection's end is known when it ends.
            parent.node.end = parent.node.end.max(done.end);
            match &mut parent.node.kind {
                Kind::Sequence { items, .. } => items.push(done),
                Kind::Mapping { pairs, .. } => match parent.key.take() {
                    None => parent.key = Some(done),
                    Some(key) => pairs.push((key, done.behind_colon(text))),
                },
                Kind::Scalar { .. } | Kind::Alias(_) => {}
            }
        }
        Ok(None)
    }

    fn at(text: &'a str, span: &Span, decorated: bool, kind: Kind<'a>) -> Result<Self, Fault> {
        let (start, mut end) = range(span)?;
        let source = text.get(start..end).ok_or(Fault::Outside)?;
        if let Kind::Scalar {
            style: ScalarStyle::Literal | ScalarStyle::Folded,
            ..
        } = kind
        {
            // The next line's indentation is taken for a part of it.
            end = start + source.rfind('\n').map_or(source.len(), |at| at + 1);
        }
        Ok(Self {
            start,
            end,
            column: span.start.col(),
            decorated,
            kind,
        })
    }

    /// A value that is not there is placed in front of its key's colon; its place is behind it.
    fn behind_colon(mut self, text: &str) -> Self {
        if self.start == self.end && matches!(self.kind, Kind::Scalar { .. }) {
            let rest = &text[self.start..];
            let colon = rest.len() - rest.trim_start().len();
            if rest[colon..].starts_with(':') {
                (self.start, self.end) = (self.start + colon + 1, self.start + colon + 1);
            }
        }
        self
    }

    pub(super) fn is_flow(&self) -> bool {
        match self.kind {
            Kind::Sequence { flow, .. } | Kind::Mapping { flow, .. } => flow,
            Kind::Scalar { .. } | Kind::Alias(_) => false,
        }
    }

    /// Nothing, `null` or `~`, as YAML 1.1 has it.
    pub(super) fn is_null(&self) -> bool {
        let null = ["", "~", "null", "Null", "NULL"];
        match &self.kind {
            Kind::Scalar { text, style } => {
                *style == ScalarStyle::Plain && !self.decorated && null.contains(&&**text)
            }
            _ => false,
        }
    }

    /// A scalar's value; a string's, unless it is plain.
    pub(super) fn text(&self) -> Option<&str> {
        match &self.kind {
            Kind::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }

    pub(super) fn pairs(&self) -> &[(Node<'a>, Node<'a>)] {
        match &self.kind {
            Kind::Mapping { pairs, .. } => pairs,
            _ => &[],
        }
    }

    pub(super) fn items(&self) -> &[Node<'a>] {
        match &self.kind {
            Kind::Sequence { items, .. } => items,
            _ => &[],
        }
    }

    /// The value of a mapping's key.
    pub(super) fn get(&self, key: &str) -> Option<&Node<'a>> {
        let mut pairs = self.pairs().iter();
        pairs
            .find(|(found, _)| found.text() == Some(key))
            .map(|(_, value)| value)
    }

    /// Whether both are the same but for their place.
    pub(super) fn is_same(&self, other: &Node<'_>) -> bool {
        if self.decorated != other.decorated {
            return false;
        }
        match (&self.kind, &other.kind) {
            (
                Kind::Scalar { text, style },
                Kind::Scalar {
                    text: other_text,
                    style: other_style,
                },
            ) => text == other_text && style == other_style,
            (
                Kind::Sequence { flow, items },
                Kind::Sequence {
                    flow: other_flow,
                    items: others,
                },
            ) => {
                flow == other_flow
                    && items.len() == others.len()
                    && items.iter().zip(others).all(|(a, b)| a.is_same(b))
            }
            (
                Kind::Mapping { flow, pairs },
                Kind::Mapping {
                    flow: other_flow,
                    pairs: others,
                },
            ) => {
                flow == other_flow
                    && pairs.len() == others.len()
                    && pairs
                        .iter()
                        .zip(others)
                        .all(|(a, b)| a.0.is_same(&b.0) && a.1.is_same(&b.1))
            }
            (Kind::Alias(a), Kind::Alias(b)) => a == b,
            _ => false,
        }
    }
}

fn range(span: &Span) -> Result<(usize, usize), Fault> {
    let range = span.byte_range().ok_or(Fault::NoPlace)?;
    Ok((range.start, range.end))
}
