//! Opens a session with the join token of a run, and is turned away without it.
//!
//!     cargo run -p ulmus-transport --example open_session

#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;
use std::net::SocketAddr;
use std::pin::Pin;

use futures::{Stream, StreamExt, stream};
use tokio::sync::oneshot;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use ulmus_proto::v1;
use ulmus_proto::v1::coordinator_client::CoordinatorClient;
use ulmus_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use ulmus_transport::{Bound, Caller, Credentials, Limits, TOKEN_FILE, TokenSource, connect, serve};

/// A coordinator that lets in whoever has shown the token, and answers one message with nothing.
struct Greeter;

#[tonic::async_trait]
impl Coordinator for Greeter {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<v1::FromCoordinator, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::FromWorker>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let caller = Caller::of(&request)?;
        request.into_inner().message().await?;
        // Until now the connection had a deadline and counted against the limits for strangers.
        caller.admit();
        Ok(Response::new(Box::pin(stream::iter([Ok(v1::FromCoordinator::default())]))))
    }
}

async fn join(address: SocketAddr, token: &TokenSource) -> Result<usize, String> {
    let link = connect(&address.to_string(), token).await.map_err(|error| error.to_string())?;
    let hello = stream::iter([v1::FromWorker::default()]);
    let session = CoordinatorClient::new(link.service()).session(hello).await;
    Ok(session.map_err(|status| status.to_string())?.into_inner().count().await)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let [own, other] = [tempfile::tempdir()?, tempfile::tempdir()?];
    let credentials = Credentials::of_run(own.path(), &TokenSource::Unspecified)?;
    Credentials::of_run(other.path(), &TokenSource::Unspecified)?;
    let bound = Bound::new(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let (address, listener) = (bound.address()?, bound.listen()?);
    let (close, closed) = oneshot::channel::<()>();
    let routes = Routes::new(CoordinatorServer::new(Greeter));
    let server =
        serve(listener, routes, &credentials, Limits::of_this_process(), async { drop(closed.await) });
    let client = async {
        for (whose, folder) in [("this run", &own), ("another run", &other)] {
            let token = TokenSource::File(folder.path().join(TOKEN_FILE));
            println!("with the token of {whose}: {:?}", join(address, &token).await);
        }
        drop(close);
    };
    let (served, ()) = tokio::join!(server, client);
    Ok(served?)
}
