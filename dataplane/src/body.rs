//! A message body on its way to a replica, or to a client from one of our pages or from a module. A client's own is
//! hyper's stream, passed on as it is. Nothing here holds a whole body, but for our pages.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;

/// Why a body ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("the connection broke inside the body")]
    Broken(#[source] hyper::Error),
    #[error("the replica broke off inside the body")]
    Replica(#[source] std::io::Error),
    #[error("the module failed while it was producing the body")]
    Module(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The body of a request or a response, as a stream.
#[derive(Debug, Default)]
pub struct Body(Form);

#[derive(Debug, Default)]
enum Form {
    #[default]
    Empty,
    Whole(Bytes),
    Wire(Incoming),
    Stream(UnsyncBoxBody<Bytes, BodyError>),
}

impl Body {
    pub fn empty() -> Body {
        Body(Form::Empty)
    }

    pub fn whole(bytes: impl Into<Bytes>) -> Body {
        let bytes = bytes.into();
        Body(if bytes.is_empty() { Form::Empty } else { Form::Whole(bytes) })
    }

    pub fn stream<B>(body: B) -> Body
    where
        B: http_body::Body<Data = Bytes, Error = BodyError> + Send + 'static,
    {
        Body(Form::Stream(body.boxed_unsync()))
    }
}

impl From<Incoming> for Body {
    fn from(body: Incoming) -> Body {
        Body(Form::Wire(body))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.0 {
            Form::Empty => Poll::Ready(None),
            Form::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                self.0 = Form::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Form::Wire(body) => {
                Pin::new(body).poll_frame(context).map(|frame| frame.map(|frame| frame.map_err(BodyError::Broken)))
            }
            Form::Stream(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Form::Empty => true,
            Form::Whole(_) => false,
            Form::Wire(body) => body.is_end_stream(),
            Form::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Form::Empty => SizeHint::with_exact(0),
            Form::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Form::Wire(body) => body.size_hint(),
            Form::Stream(body) => body.size_hint(),
        }
    }
}
